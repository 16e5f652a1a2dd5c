"""The widths of DeepSeek-V4's attention: a sliding window, and compressed entries of all earlier tokens.

A layer's compression ratio decides. 0: the window alone. 4: an entry of each four tokens, of which a lightning indexer
selects some for each query. Any other: an entry of each `ratio` tokens, all attended to. Keys and values are the same
tensor of one head. The rotary channels of a head come last; the attention's output is rotated back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from ..errors import CheckpointError
from .config_reader import MAX_LAYERS, MAX_POSITIONS, ConfigReader, shown

SELECTING_RATIO: Final = 4
"""The ratio of the layers whose compressed entries overlap and are selected by an indexer."""


@dataclass(frozen=True)
class CompressedAttention:
    """Widths of attention over a window and compressed entries.

    heads: query heads. head_dim: channels of a head's query, and of the one key and value. rotary_dim: its last
    channels, which are rotated. q_lora_rank: channels of the queries' latent. o_groups, o_lora_rank: groups of heads
    with an output projection of their own, and its outputs. sliding_window: the last tokens, attended to as they are.
    index_n_heads, index_head_dim, index_topk: heads of an index query, channels of a head, and the compressed entries
    that a query selects. compress_ratios: of each decoder layer, then of each multi-token-prediction layer.
    """

    heads: int
    head_dim: int
    rotary_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    compress_ratios: tuple[int, ...]

    # The key of config.json that decides a condition.
    KEYS: ClassVar[Mapping[str, str]] = {"compressor": "compress_ratios", "indexer": "compress_ratios"}
    kv_heads: ClassVar[int] = 1
    rotary_interleaved: ClassVar[bool] = True
    rotary_temperature: ClassVar[bool] = False

    @classmethod
    def read(cls, read: ConfigReader) -> CompressedAttention:
        """Read the widths under DeepSeek's names; CheckpointError names a key that is missing or malformed."""
        read.only("num_key_value_heads", 1)
        widths = cls(
            heads=read.size("num_attention_heads"),
            head_dim=read.size("head_dim"),
            rotary_dim=read.size("qk_rope_head_dim"),
            q_lora_rank=read.size("q_lora_rank"),
            o_groups=read.size("o_groups"),
            o_lora_rank=read.size("o_lora_rank"),
            sliding_window=read.size("sliding_window", most=MAX_POSITIONS),
            index_n_heads=read.size("index_n_heads"),
            index_head_dim=read.size("index_head_dim"),
            index_topk=read.size("index_topk", most=MAX_POSITIONS),
            compress_ratios=_ratios(read),
        )
        if widths.heads % widths.o_groups:
            raise CheckpointError(
                f"config.json: {widths.heads} num_attention_heads cannot be divided into {widths.o_groups} o_groups"
            )
        for key, channels in (("head_dim", widths.head_dim), ("index_head_dim", widths.index_head_dim)):
            if channels < widths.rotary_dim:
                raise CheckpointError(
                    f"config.json: {key} {channels} cannot hold the {widths.rotary_dim} channels of qk_rope_head_dim"
                )
        return widths

    def ratio(self, layer: int) -> int:
        """Tokens of a compressed entry in a layer; 0 where it attends to the window alone."""
        return self.compress_ratios[layer] if layer < len(self.compress_ratios) else 0

    def selects(self, layer: int) -> bool:
        """True for a layer whose indexer selects compressed entries, which overlap."""
        return self.ratio(layer) == SELECTING_RATIO

    @property
    def qk_head_dim(self) -> int:
        """Channels of one head's query and key."""
        return self.head_dim

    @property
    def cache_scales(self) -> int:
        """0: entries are cached in the compute dtype."""
        return 0

    @property
    def attended_products(self) -> int:
        """Products that one query and one key take: a score of each head, and its value."""
        return 2 * self.heads * self.head_dim

    @property
    def dense_tokens(self) -> int | None:
        """The longest sequence in which every query attends to all earlier tokens: the window."""
        return self.sliding_window

    def stated(self) -> dict[str, Any]:
        """DeepSeek's keys, which the engines read; transformers reads both its own and these."""
        return {"compress_ratios": list(self.compress_ratios), "qk_rope_head_dim": self.rotary_dim}

    def sizes(self) -> dict[str, int]:
        """The table's words of shapes, as numbers."""
        return {
            "q": self.heads * self.head_dim,
            "q_lora": self.q_lora_rank,
            "head": self.head_dim,
            "heads": self.heads,
            "group": self.heads * self.head_dim // self.o_groups,
            "o_lora": self.o_groups * self.o_lora_rank,
            "index_q": self.index_n_heads * self.index_head_dim,
            "index_heads": self.index_n_heads,
            "index_head": self.index_head_dim,
            "index_series": 2 * self.index_head_dim,
        }

    def layer_sizes(self, layer: int) -> dict[str, int]:
        """The ratio, and the channels of the compressed series: two series where entries overlap."""
        series = 2 if self.selects(layer) else 1
        return {"ratio": self.ratio(layer), "series": series * self.head_dim}

    def conditions(self, layer: int) -> dict[str, bool]:
        """The table's words of conditions; True for those that hold in a layer."""
        return {"compressor": self.ratio(layer) > 0, "indexer": self.selects(layer)}

    def takes_selection(self, layer: int) -> bool:
        """True for a layer that attends to the tokens that a layer below selected: none."""
        return False

    def numbers_held(self, tokens: int, length: int) -> int:
        """Numbers that attention in slices holds at once: for `tokens` tokens queries and outputs three times each,
        keys twice; for one slice the scores of the window and of the compressed entries, four times in its softmax."""
        compressed = length // min((ratio for ratio in self.compress_ratios if ratio), default=length)
        token = 6 * self.heads * self.head_dim + 2 * self.head_dim
        return tokens * token + 4 * self.heads * length * (length + compressed)


def _ratios(read: ConfigReader) -> tuple[int, ...]:
    layers = read.size("num_hidden_layers", most=MAX_LAYERS)
    drafts = read.count("num_nextn_predict_layers", 0, most=MAX_LAYERS)
    ratios = read.numbers("compress_ratios", MAX_POSITIONS)
    if len(ratios) < layers:
        raise CheckpointError(
            f"config.json: compress_ratios has {len(ratios)} numbers for {layers} num_hidden_layers: one a layer, then "
            "one a multi-token-prediction layer"
        )
    compressing = {ratio for ratio in ratios[:layers] if ratio not in (0, SELECTING_RATIO)}
    if len(compressing) > 1:
        raise CheckpointError(
            f"config.json: compress_ratios has {shown(sorted(compressing))}; besides 0 and {SELECTING_RATIO} all "
            "layers have one ratio"
        )
    return tuple((ratios + [0] * drafts)[: layers + drafts])
