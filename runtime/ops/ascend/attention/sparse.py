"""Sparse latent attention on torch_npu: the lightning indexer, and absorbed attention to the tokens that it selects.

Both operators read ND pages `[blocks, block_size, 1, channels]`, and lengths as int32 tensors on the device.
"""

from __future__ import annotations

from torch import Tensor

from ....attention.pools import LayerCache, Pages
from ...handles import IndexerConfig, IndexerParts, IndexerWeights
from ...latent_attention import LATENT, ROPE
from ...norms import Norms
from ...products import Products
from ...rotary import Rotary
from ...sparse_attention import SparseAttention
from ...steps import Decode
from ...weights import Weights
from ..device import RIGHT_DOWN_CAUSAL, Npu
from .limits import absorbed_heads, check_indexer, pad_heads

ABSORBED_MLA = 2  # attention_mode: the latent is key and value, and rope stands beside it
ONE_TOKEN = 1  # sparse_block_size: every index is one token


class AscendSparseAttention(SparseAttention):
    """Selection and attention on torch_npu. Its steps have `Decode.device_lens`."""

    def __init__(self, npu: Npu, weights: Weights, norms: Norms, products: Products, rotary: Rotary):
        super().__init__(npu.dtype, weights, norms, products, rotary)
        self.npu = npu

    def load(self, parts: IndexerParts, config: IndexerConfig) -> IndexerWeights:
        check_indexer(parts.q.name, config.n_heads, config.head_dim, config.topk)
        return super().load(parts, config)

    def write_rows(self, pages: Pages, slots: Tensor, rows: Tensor) -> None:
        # Slot −1 counts from the end: it lies in the block that belongs to no sequence (AscendCaches.new).
        pages.tensor.view(-1, pages.pool.channels)[slots] = rows

    def lightning_indexer(self, query: Tensor, weights: Tensor, keys: Pages, decode: Decode, count: int) -> Tensor:
        q_lens, kv_lens = device_lens(decode)
        selected: Tensor = self.npu.operators.npu_lightning_indexer(
            query.contiguous(),
            keys.tensor,
            weights.contiguous(),
            actual_seq_lengths_query=q_lens,  # cumulative
            actual_seq_lengths_key=kv_lens,  # a length each
            block_table=decode.block_table,
            layout_query="TND",
            layout_key="PA_BSND",
            sparse_count=count,
            sparse_mode=RIGHT_DOWN_CAUSAL,
        )[0]
        return selected

    def sparse_flash_attention(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, selected: Tensor, scale: float
    ) -> Tensor:
        heads = q_latent.shape[1]
        padded = absorbed_heads(heads)
        q_lens, kv_lens = device_lens(decode)
        latent = cache[LATENT].tensor
        attended: Tensor = self.npu.operators.npu_sparse_flash_attention(
            pad_heads(q_latent, padded).contiguous(),
            latent,
            latent,
            selected,
            scale,
            block_table=decode.block_table,
            actual_seq_lengths_query=q_lens,
            actual_seq_lengths_kv=kv_lens,
            query_rope=pad_heads(q_rope, padded).contiguous(),
            key_rope=cache[ROPE].tensor,
            sparse_block_size=ONE_TOKEN,
            layout_query="TND",
            layout_kv="PA_BSND",
            sparse_mode=RIGHT_DOWN_CAUSAL,
            attention_mode=ABSORBED_MLA,
        )[0]
        return attended[:, :heads]


def device_lens(decode: Decode) -> tuple[Tensor, Tensor]:
    """The step's lengths on the device, of queries (cumulative) and of keys: int32 `[sequences]` each."""
    assert decode.device_lens is not None  # a tensor made here would wait for the device, in every layer
    q_lens, kv_lens = decode.device_lens
    return q_lens, kv_lens
