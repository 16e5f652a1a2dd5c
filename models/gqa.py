"""The widths of grouped-query attention (arXiv:2305.13245): several query heads share one key and value head.

Qwen3 and GLM-4.5 put an RMS norm over each head's channels of queries and keys, before their rotation, with one gain
for all heads. The rotary channels of a head come first, in pairs (i, i + rotary / 2); the rest keep no position.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import CheckpointError
from .config_reader import ConfigReader


@dataclass(frozen=True)
class Gqa:
    """Widths of grouped-query attention.

    heads, kv_heads: query heads, and heads of keys and values, which divide them. head_dim: channels of a head, which
    need not be hidden_size / heads. rotary_dim: the first channels of a head that are rotated. use_qk_norm: queries and
    keys have an RMS norm. attention_bias: q, k and v have biases; o has none.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    use_qk_norm: bool
    attention_bias: bool

    # The key of config.json that decides a condition.
    KEYS: ClassVar[Mapping[str, str]] = {"qk_norm": "use_qk_norm", "attention_bias": "attention_bias"}
    rotary_interleaved: ClassVar[bool] = False
    rotary_temperature: ClassVar[bool] = False

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.heads // self.kv_heads

    @property
    def qk_head_dim(self) -> int:
        """Channels of one head's query and key."""
        return self.head_dim

    @property
    def cache_scales(self) -> int:
        """0: keys and values are cached in the compute dtype."""
        return 0

    @property
    def attended_products(self) -> int:
        """Products that one query and one key take: a score of each head, and its value."""
        return 2 * self.heads * self.head_dim

    @property
    def dense_tokens(self) -> int | None:
        """The longest sequence in which every query attends to all earlier tokens; None: any."""
        return None

    def stated(self) -> dict[str, int | float | bool | str | None]:
        """Keys of config.json that some loader reads otherwise, with the values that all read alike; None: any."""
        whole = self.rotary_dim == self.head_dim
        return {
            "head_dim": self.head_dim,
            "partial_rotary_factor": None if whole else self.rotary_dim / self.head_dim,
        }

    def sizes(self) -> dict[str, int]:
        """The table's words of shapes, as numbers."""
        return {"q": self.heads * self.head_dim, "kv": self.kv_heads * self.head_dim, "head": self.head_dim}

    def layer_sizes(self, layer: int) -> dict[str, int]:
        """The words whose number is a layer's own: none."""
        return {}

    def conditions(self, layer: int) -> dict[str, bool]:
        """The table's words of conditions; True for those that hold in a layer: in all or in none."""
        return {"qk_norm": self.use_qk_norm, "attention_bias": self.attention_bias}

    def takes_selection(self, layer: int) -> bool:
        """True for a layer that attends to the tokens that a layer below selected."""
        return False

    def numbers_held(self, tokens: int, length: int) -> int:
        """Numbers that attention in slices holds at once: for `tokens` tokens the queries four times, keys and values
        twice each, outputs twice; for one slice the scores [heads, `length`, `length`], four times in its softmax."""
        token = 6 * self.heads * self.head_dim + 4 * self.kv_heads * self.head_dim
        return tokens * token + 4 * self.heads * length**2


@dataclass(frozen=True)
class GqaDefaults:
    """Reads grouped-query attention from config.json, with a family's defaults.

    use_qk_norm: None where `use_qk_norm` decides, else the value for every model. partial_rotary_factor: the default of
    the key; None for a family whose loaders rotate every channel and read no such key.
    """

    use_qk_norm: bool | None
    partial_rotary_factor: float | None

    def read(self, read: ConfigReader) -> Gqa:
        """Read the widths under Hugging Face's names; CheckpointError names a key that is missing or malformed."""
        heads = read.size("num_attention_heads")
        # Loaders have three different defaults.
        kv_heads = read.size("num_key_value_heads")
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: {heads} num_attention_heads cannot be shared by {kv_heads} num_key_value_heads: they "
                "must divide them"
            )
        head_dim = read.size("head_dim", read.size("hidden_size") // heads or 1)
        return Gqa(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=self._rotary_dim(read, head_dim),
            use_qk_norm=read.flag("use_qk_norm", False) if self.use_qk_norm is None else self.use_qk_norm,
            attention_bias=read.flag("attention_bias", False),
        )

    def _rotary_dim(self, read: ConfigReader, head_dim: int) -> int:
        factor = read.number("partial_rotary_factor", self.partial_rotary_factor or 1.0, 0.0, 1.0)
        if self.partial_rotary_factor is None and factor != 1:
            raise CheckpointError(
                f"config.json: partial_rotary_factor {factor:g} is not read by the loaders of this family, which "
                "rotate every channel: remove it"
            )
        width = factor * head_dim
        if width < 1 or width != int(width):
            raise CheckpointError(
                f"config.json: partial_rotary_factor {factor:g} of head_dim {head_dim} is no whole number of channels"
            )
        return int(width)
