"""Bytes of the tensors that a step holds at once, beside weights and cache.

An estimate from the largest tensors of each block (`runtime/attention/`, `runtime/ops/`). What operators take inside,
such as CANN's workspaces, and what allocators hold of freed tensors is not in it. Nor is what captured graphs keep:
their inputs (0.6 MB at DeepSeek-V3's sizes and 32 sequences, nearly all block tables) and logits (28 MB).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ...models.compressed_attention import CompressedAttention
from ...models.config import ModelConfig
from ...models.gqa import Gqa
from ...models.moe import Moe
from ...models.sparse_mla import SparseMla
from ..ranks.layout import Owned

_INT8, _INT32, _FLOAT32 = 1, 4, 4
_SCORES, _MASKS = 8, 4
"""Of a query and a compressed entry: scores, sorted scores and their places, and flags, at once."""
_ROWS: Final = 6
"""Rows of the hidden size that live through a layer: residual, its sum, normed rows and their codes, a block's output
and the next."""


@dataclass(frozen=True)
class Workspace:
    """fixed: bytes at any length, spare blocks of the cache included. context_token: more bytes for every cached token
    of the longest sequence, because a prefill chunk keeps its outputs over all segments of what is cached."""

    fixed: int
    context_token: int

    def plus(self, fixed: int) -> Workspace:
        return Workspace(self.fixed + fixed, self.context_token)

    def times(self, factor: float) -> Workspace:
        return Workspace(int(self.fixed * factor), int(self.context_token * factor))


@dataclass(frozen=True)
class StepSizes:
    """Sizes of a step and its cache, as in `EngineConfig`. logit_rows: rows of logits; generation needs one a sequence.
    block_size: tokens of a block.
    """

    max_num_batched_tokens: int = 1024
    prefix_segment_tokens: int = 4096
    logit_rows: int = 32
    block_size: int = 128


def workspace(config: ModelConfig, owned: Owned, itemsize: int, sizes: StepSizes) -> Workspace:
    """Bytes of a step of `sizes` on a rank. itemsize: bytes of the compute dtype."""
    tokens, hidden = sizes.max_num_batched_tokens, config.hidden_size
    blocks = [_attention(config, owned, itemsize, sizes), _mlp(config, owned, itemsize, tokens)]
    if config.moe is not None:
        blocks.append(_experts(config.moe, hidden, owned, itemsize, tokens))
    # Rank 0 has the logits of the whole vocabulary, gathered, and once more in float32.
    blocks.append(sizes.logit_rows * config.vocab_size * (2 * itemsize + _FLOAT32))
    streams = 1 if config.hyper_connections is None else config.hyper_connections.hc_mult
    rows = _ROWS * streams * tokens * hidden * itemsize
    return Workspace(rows + max(blocks), _context_token(config, owned, itemsize, sizes))


def _context_token(config: ModelConfig, owned: Owned, itemsize: int, sizes: StepSizes) -> int:
    """Outputs of a chunk's attention to one segment of what is cached; grouped-query attention has no segments. With
    compressed entries, all of a sequence: themselves, and the scores and masks of one head."""
    widths, tokens = config.attention, sizes.max_num_batched_tokens
    if isinstance(widths, Gqa):
        return 0
    if isinstance(widths, CompressedAttention):
        entry = 3 * widths.head_dim * _FLOAT32 + tokens * (_SCORES * _FLOAT32 + _MASKS)
        return -(-entry // min((ratio for ratio in widths.compress_ratios if ratio), default=entry))
    values = len(owned.heads) * widths.sizes()["v_head"]
    kept = tokens * (values * itemsize + len(owned.heads) * _FLOAT32)
    return -(-kept // sizes.prefix_segment_tokens)


def _attention(config: ModelConfig, owned: Owned, itemsize: int, sizes: StepSizes) -> int:
    """Queries, the decompressed keys and values of the longest segment, outputs; with selection also absorbed queries
    and their outputs. Of grouped-query attention the product with q, k and v, these normed and rotated, outputs. With
    compressed entries queries and outputs, normed and rotated, series and gates, and the matrix `o_a` in float32."""
    widths, heads, tokens = config.attention, len(owned.heads), sizes.max_num_batched_tokens
    if isinstance(widths, CompressedAttention):
        words = widths.sizes()
        row = 5 * heads * widths.head_dim + 8 * widths.head_dim + words["index_q"] + words["o_lora"]
        return tokens * row * itemsize + words["o_lora"] * words["group"] * _FLOAT32
    if isinstance(widths, Gqa):
        queries, keys = heads * widths.head_dim, len(owned.dimension("kv"))
        return tokens * (4 * queries + 6 * keys) * itemsize + _summed(config, owned, tokens)
    found = widths.sizes()
    latent, value, key = found["kv_lora"], found["v_head"], widths.qk_head_dim
    query = tokens * heads * 2 * key
    keys = max(tokens, min(sizes.prefix_segment_tokens, config.rope.positions)) * heads * (key + value)
    outputs = 2 * tokens * heads * value
    numbers = query + keys + outputs + tokens * (found["q_lora"] + found["kv_a"])
    if isinstance(widths, SparseMla):
        index = tokens * (found["index_q"] + found["index_heads"])
        absorbed = query + index + 2 * tokens * heads * latent
        numbers = max(numbers, absorbed)
    return numbers * itemsize + _summed(config, owned, tokens)


def _mlp(config: ModelConfig, owned: Owned, itemsize: int, tokens: int) -> int:
    found = config.moe
    widest = max(len(owned.tiles(config.intermediate_size)), 0 if found is None else len(_shared(found, owned)))
    return tokens * widest * (2 * itemsize + _INT8) + _summed(config, owned, tokens)


def _shared(moe: Moe, owned: Owned) -> range:
    return owned.tiles(moe.shared_intermediate_size)


def _experts(moe: Moe, hidden: int, owned: Owned, itemsize: int, tokens: int) -> int:
    """Rows of the routed tokens through an expert, were all of them on this rank, and their exchange."""
    rows, width = tokens * moe.num_experts_per_tok, moe.moe_intermediate_size
    inside = rows * (hidden * _INT8 + width * (2 * itemsize + _INT8) + hidden * itemsize)
    exchanged = 2 * rows * hidden * itemsize if owned.layout.ep > 1 else 0
    return inside + exchanged + tokens * (hidden + moe.n_routed_experts) * _FLOAT32


def _summed(config: ModelConfig, owned: Owned, tokens: int) -> int:
    """The integer sum over the ranks of a product whose inputs are divided, and its scaled rows."""
    return tokens * config.hidden_size * (_INT32 + _FLOAT32) if owned.layout.tp > 1 else 0
