"""The widths of multi-head latent attention (DeepSeek-V2, arXiv:2405.04434)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..errors import CheckpointError
from .config_reader import ConfigReader


@dataclass(frozen=True)
class Mla:
    """Widths of multi-head latent attention; `q_lora_rank` is None where queries have no latent of their own."""

    heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    # The key of config.json that decides a condition.
    KEYS: ClassVar[Mapping[str, str]] = {"q_lora": "q_lora_rank", "full_q": "q_lora_rank"}
    kv_heads: ClassVar[int] = 1
    rotary_interleaved: ClassVar[bool] = True
    rotary_temperature: ClassVar[bool] = True

    @classmethod
    def read(cls, read: ConfigReader) -> Mla:
        """Read the widths under Hugging Face's names; CheckpointError names a key that is missing or malformed."""
        if read.number("partial_rotary_factor", 1.0) != 1:
            raise CheckpointError("config.json: partial_rotary_factor is not supported; give qk_rope_head_dim")
        return cls(
            heads=read.size("num_attention_heads"),
            q_lora_rank=read.size("q_lora_rank") if read.has_value("q_lora_rank") else None,
            kv_lora_rank=read.size("kv_lora_rank"),
            qk_nope_head_dim=read.size("qk_nope_head_dim"),
            qk_rope_head_dim=read.size("qk_rope_head_dim"),
            v_head_dim=read.size("v_head_dim"),
        )

    @property
    def attended_products(self) -> int:
        """Products that one query and one key take: a score of each head, and its value."""
        return self.heads * (self.qk_head_dim + self.v_head_dim)

    def sizes(self) -> dict[str, int]:
        """The table's words of shapes, as numbers."""
        return {
            "q": self.heads * self.qk_head_dim,
            "q_lora": self.q_lora_rank or 0,
            "kv_lora": self.kv_lora_rank,
            "kv_a": self.kv_lora_rank + self.qk_rope_head_dim,
            "kv_b": self.heads * (self.qk_nope_head_dim + self.v_head_dim),
            "kv_b_head": self.qk_nope_head_dim + self.v_head_dim,
            "nope": self.qk_nope_head_dim,
            "v": self.heads * self.v_head_dim,
            "v_head": self.v_head_dim,
        }

    def layer_sizes(self, layer: int) -> dict[str, int]:
        """The words whose number is a layer's own: none."""
        return {}

    def conditions(self, layer: int) -> dict[str, bool]:
        """The table's words of conditions; True for those that hold in a layer: in all or in none."""
        return {"q_lora": self.q_lora_rank is not None, "full_q": self.q_lora_rank is None}

    def stated(self) -> dict[str, int | float | bool | str | None]:
        """Keys of config.json that some loader reads otherwise, with the values that all read alike; None: any."""
        return {}

    @property
    def dense_tokens(self) -> int | None:
        """The longest sequence in which every query attends to all earlier tokens; None: any."""
        return None

    def takes_selection(self, layer: int) -> bool:
        """True for a layer that attends to the tokens that a layer below selected."""
        return False

    @property
    def qk_head_dim(self) -> int:
        """Channels of one head's query and key: those without position, then the rotary ones."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.qk_rope_head_dim

    @property
    def cache_scales(self) -> int:
        """Scales of a layer's int8 KV cache: one for each channel of the latent."""
        return self.kv_lora_rank

    def numbers_held(self, tokens: int, length: int) -> int:
        """Numbers that attention over slices of decompressed keys holds at once: for `tokens` tokens the queries three
        times, keys and values, outputs; for one slice the scores [heads, `length`, `length`], four times in its
        softmax."""
        token = 4 * self.qk_head_dim + self.qk_nope_head_dim + 4 * self.v_head_dim
        return self.heads * (tokens * token + 4 * length**2)
