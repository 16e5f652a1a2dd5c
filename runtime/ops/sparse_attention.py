"""Sparse latent attention: a lightning indexer selects the tokens that each query attends to (DeepSeek-V3.2-Exp).

A query's score of an earlier token is Σ_h w_h · max(0, q_h · k), over small index heads h that share one key. Constant
factors of the scores are left out: they do not change which are largest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..attention.pools import LayerCache, Pages
from .handles import Activation, IndexerConfig, IndexerParts, IndexerWeights, own
from .norms import Norms
from .products import Products
from .rotary import Rotary
from .steps import Decode, Positions
from .weights import Weights

INDEX_KEY = "index_key"
"""Pool of the cache."""
LAYER_NORM_EPS = 1e-6
"""Of the index keys' layer norm; it does not follow rms_norm_eps."""


class SparseAttention(ABC):
    """Selection of tokens and attention to them, and composites with products, norms and rope.

    dtype: the compute dtype.
    """

    def __init__(self, dtype: torch.dtype, weights: Weights, norms: Norms, products: Products, rotary: Rotary):
        self.dtype, self.weights, self.norms, self.products, self.rotary = dtype, weights, norms, products, rotary

    @abstractmethod
    def lightning_indexer(self, query: Tensor, weights: Tensor, keys: Pages, decode: Decode, count: int) -> Tensor:
        """Select `count` tokens a query, those of the largest scores, or all that it sees: int32 `[T, 1, count]`.

        query `[T, n, d]`, weights `[T, n]`, keys: pages of `d` channels; all in the compute dtype, the scores in
        float32. A query sees its own token and those before it. Of equal scores the earlier token wins, and a score
        that is no number is the largest. A row has its selected positions first, in no defined order, then −1.
        """

    @abstractmethod
    def sparse_flash_attention(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, selected: Tensor, scale: float
    ) -> Tensor:
        """Absorbed attention of each query to selected tokens: `[T, N, L]`.

        As `LatentAttention.fused_infer_attention_paged` otherwise.
        selected: int32 `[T, 1, k]`, positions in the query's sequence, each once and all visible to it, then −1.
        """

    def load(self, parts: IndexerParts, config: IndexerConfig) -> IndexerWeights:
        """Make the handle of one layer."""
        return IndexerWeights(
            config=config,
            q=self.weights.linear_of([parts.q]),
            k=self.weights.linear_of([parts.k]),
            k_norm=self.weights.parameter(parts.k_norm, torch.float32),
            k_norm_bias=self.weights.parameter(parts.k_norm_bias, torch.float32),
            weights=self.weights.linear_of([parts.weights]),
        )

    def write_keys(self, hidden: Tensor, indexer: IndexerWeights, positions: Positions, cache: LayerCache) -> None:
        """Write the index keys of hidden rows `[T, H]` into the cache."""
        weights = own(indexer, IndexerWeights)
        keys = self.norms.layer_norm(
            self.products.linear(hidden, weights.k), weights.k_norm, weights.k_norm_bias, LAYER_NORM_EPS
        )
        rotated = self._rotate(keys[:, None], weights.config, positions)[:, 0]
        self.write_rows(cache[INDEX_KEY], positions.slots, rotated)

    def write_rows(self, pages: Pages, slots: Tensor, rows: Tensor) -> None:
        """Write index keys `[T, d]` at slots int64 `[T]`; skip negative slots."""
        pages.write(slots, rows)

    def select(
        self,
        hidden: Tensor,
        q_latent: Activation,
        indexer: IndexerWeights,
        cache: LayerCache,
        positions: Positions,
        decode: Decode,
    ) -> Tensor:
        """Select tokens for every row, after `write_keys`: int32 `[T, 1, topk]`.

        hidden `[T, H]`. q_latent `[T, q_lora]`: the input of the attention's own q_b.
        """
        weights = own(indexer, IndexerWeights)
        config = weights.config
        query = self.products.linear(q_latent, weights.q).unflatten(-1, (config.n_heads, config.head_dim))
        query = self._rotate(query, config, positions)
        head_weights = self.products.linear(hidden, weights.weights)
        return self.lightning_indexer(query, head_weights, cache[INDEX_KEY], decode, config.topk)

    def _rotate(self, x: Tensor, config: IndexerConfig, positions: Positions) -> Tensor:
        """Rotate the first channels of `[T, n, d]`. Unlike in the attention's own heads they come before the others."""
        rotary, rest = x.split([config.rope_dim, config.head_dim - config.rope_dim], dim=-1)
        rotate = self.rotary.interleave_rope if config.rope_interleave else self.rotary.rotary_mul
        return torch.cat([rotate(rotary, positions.cos, positions.sin), rest], dim=-1)
