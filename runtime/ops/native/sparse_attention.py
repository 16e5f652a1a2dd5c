"""Sparse latent attention on native kernels: index scores, their largest, and attention to gathered tokens."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ....native.integers import int64_array
from ....native.pointers import address, output
from ...attention.pools import LayerCache, Pages
from ..norms import Norms
from ..products import Products
from ..rotary import Rotary
from ..sparse_attention import SparseAttention
from ..steps import Decode
from ..weights import Weights
from .cache import native_pages
from .kernels import Kernels
from .latent_attention import latent_cache
from .step import decode_arguments


class NativeSparseAttention(SparseAttention):
    """Selection and attention in C. Raises ValueError for tensors that do not have the dtypes and sizes of their call.

    Memory for scores is bounded: those of some queries at a time.
    """

    def __init__(self, kernels: Kernels, weights: Weights, norms: Norms, products: Products, rotary: Rotary):
        super().__init__(kernels.dtype, weights, norms, products, rotary)
        self._call = kernels.pool.call

    def lightning_indexer(self, query: Tensor, weights: Tensor, keys: Pages, decode: Decode, count: int) -> Tensor:
        query, weights, table = query.contiguous(), weights.contiguous(), decode.block_table.contiguous()
        tokens, heads = query.shape[:2]
        struct = native_pages(keys)
        selected, to = output(torch.int32, tokens, 1, count)
        self._call(
            "lightning_indexer",
            ctypes.byref(struct),
            address(query, "lightning_indexer", "query", keys.tensor.dtype, tokens, heads, keys.pool.channels),
            address(weights, "lightning_indexer", "weights", keys.tensor.dtype, tokens, heads),
            heads,
            *decode_arguments("lightning_indexer", decode, table, tokens),
            count,
            to,
        )
        return selected

    def sparse_flash_attention(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, selected: Tensor, scale: float
    ) -> Tensor:
        q_latent, q_rope, native = q_latent.contiguous(), q_rope.contiguous(), latent_cache(cache, self.dtype)
        table, selected, (tokens, heads) = decode.block_table.contiguous(), selected.contiguous(), q_latent.shape[:2]
        count = selected.shape[-1]
        out, to = output(self.dtype, tokens, heads, native.latent_dim)
        self._call(
            "attention_selected",
            ctypes.byref(native.struct),
            address(q_latent, "attention_selected", "q_latent", self.dtype, tokens, heads, native.latent_dim),
            address(q_rope, "attention_selected", "q_rope", self.dtype, tokens, heads, native.rope_dim),
            heads,
            *decode_arguments("attention_selected", decode, table, tokens),
            address(selected, "attention_selected", "selected", torch.int32, tokens, 1, count),
            count,
            scale,
            to,
        )
        return out

    def top_k(self, scores: Tensor, seen: list[int], count: int) -> Tensor:
        """The selection of `lightning_indexer` alone: of scores float32 `[rows, cols]` the first seen[row] ones."""
        rows, cols = scores.shape
        selected, to = output(torch.int32, rows, count)
        if len(seen) != rows:
            raise ValueError(f"top_k: {len(seen)} numbers of columns for {rows} rows")
        counts = int64_array(seen, "top_k", "seen")
        self._call(
            "top_k", address(scores, "top_k", "scores", torch.float32, rows, cols), rows, cols, counts, count, to
        )
        return selected
