"""Grouped-query attention: several query heads share one head of keys and values (arXiv:2305.13245)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..attention.pools import LayerCache
from .handles import Activation, AttentionWeights, Linear, LinearPart
from .norms import Norms
from .products import Products
from .rotary import Rotary
from .steps import Decode, Lengths, Positions, Step
from .weights import Weights

KEY, VALUE = "key", "value"
"""Pools of the cache, of `kv_heads · head_dim` channels each."""


@dataclass(frozen=True)
class GqaConfig:
    """Widths and constants of grouped-query attention.

    heads, kv_heads: of this rank. Query head h reads the keys and values of head h // (heads / kv_heads).
    rope_dim: the first channels of a head, which are rotary in half-split pairs.
    """

    heads: int
    kv_heads: int
    head_dim: int
    rope_dim: int
    rms_norm_eps: float
    softmax_scale: float


@dataclass(frozen=True)
class GqaParts:
    """The stored attention weights of one layer, from which `GroupedAttention.load` makes its handle.

    q `[N·d, H]`, k and v `[K·d, H]`, o `[H, N·d]`. biases: those of q, k and v, float, or None. q_norm, k_norm: float
    `[d]`, or None in models without. Where ranks divide the heads, all have this rank's alone.
    """

    q: LinearPart
    k: LinearPart
    v: LinearPart
    o: LinearPart
    biases: tuple[Tensor, Tensor, Tensor] | None = None
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass(frozen=True)
class Gqa(AttentionWeights):
    """Handle of a layer's grouped-query attention.

    qkv: one fused linear for (q | k | v), or several where their schemes differ. bias: `[(N + 2K)·d]` in the compute
    dtype, added to the rounded product.
    """

    config: GqaConfig
    qkv: tuple[Linear, ...]
    bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear


class GroupedAttention(ABC):
    """Operators of grouped-query attention, and composites of them with products, norms and rope.

    dtype: the compute dtype.
    """

    def __init__(self, dtype: torch.dtype, weights: Weights, norms: Norms, products: Products, rotary: Rotary):
        self.dtype, self.weights, self.norms, self.products, self.rotary = dtype, weights, norms, products, rotary

    @abstractmethod
    def scatter_pa_kv_cache(self, key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
        """Write keys and values `[T, K, d]` at slots int64 `[T]` of the cache in place; skip negative slots."""

    @abstractmethod
    def fused_infer_attention(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float
    ) -> Tensor:
        """Attention over ragged sequences ("TND"): query `[T, N, d]`, key and value `[S, K, d]` → `[T, N, d]`.

        Softmax in float32; a row that sees no key gives 0.
        """

    @abstractmethod
    def fused_infer_attention_paged(self, query: Tensor, cache: LayerCache, decode: Decode, scale: float) -> Tensor:
        """Attention on the paged cache: query `[T, N, d]` → `[T, N, d]`.

        Causal within a sequence, aligned at the end. Any number of queries a sequence.
        """

    def norm(
        self, x: Tensor | None, residual: Tensor, gamma: Tensor, eps: float, gqa: Gqa
    ) -> tuple[Activation, Tensor]:
        """Normalise x + residual before attention: (normed, x + residual). x is None before the first layer.

        A backend may return quantized rows, where `gqa` takes them.
        """
        if x is None:
            return self.norms.rms_norm(residual, gamma, eps), residual
        return self.norms.add_rms_norm(x, residual, gamma, eps)

    def load(self, parts: GqaParts, config: GqaConfig) -> Gqa:
        """Make the handle of one layer."""
        groups = self.weights.fusible([parts.q, parts.k, parts.v])

        def gain(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else self.weights.parameter(tensor, self.dtype)

        return Gqa(
            config=config,
            qkv=tuple(self.weights.linear_of(group) for group in groups),
            bias=None if parts.biases is None else gain(torch.cat(parts.biases)),
            q_norm=gain(parts.q_norm),
            k_norm=gain(parts.k_norm),
            o=self.weights.row_parallel_of(parts.o),
        )

    def project(self, hidden: Activation, gqa: Gqa, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Project `[T, H]` to queries `[T, N, d]`, keys and values `[T, K, d]`; norm and rotate queries and keys."""
        config = gqa.config
        products = self.products.linears(hidden, gqa.qkv)
        qkv = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        if gqa.bias is not None:
            qkv = qkv + gqa.bias
        heads = qkv.unflatten(-1, (-1, config.head_dim))
        q, k, v = heads.split([config.heads, config.kv_heads, config.kv_heads], dim=1)
        if gqa.q_norm is not None and gqa.k_norm is not None:
            q, k = self._norm_heads(q, gqa.q_norm, config), self._norm_heads(k, gqa.k_norm, config)
        q, k = self.rotate(q, k, config, positions)
        return q, k, v

    def rotate(self, q: Tensor, k: Tensor, config: GqaConfig, positions: Positions) -> tuple[Tensor, Tensor]:
        """Rotate the first `rope_dim` channels of queries `[T, N, d]` and keys `[T, K, d]`."""
        return self._rotate(q, config, positions), self._rotate(k, config, positions)

    def write(
        self, hidden: Activation, gqa: Gqa, cache: LayerCache, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project as `project` does and write the cache; keys and values come as later tokens read them."""
        query, key, value = self.project(hidden, gqa, positions)
        self.scatter_pa_kv_cache(key, value, cache, positions.slots)
        return query, *self.as_cached(key, value, cache)

    def as_cached(self, key: Tensor, value: Tensor, cache: LayerCache) -> tuple[Tensor, Tensor]:
        """Keys and values `[T, K, d]` as they are read back: rounded, in an int8 cache."""

        def rounded(name: str, rows: Tensor) -> Tensor:
            return rows if cache[name].scale is None else cache[name].rounded(rows.flatten(1)).view_as(rows)

        return rounded(KEY, key), rounded(VALUE, value)

    def decode(self, hidden: Activation, gqa: Gqa, cache: LayerCache, step: Step) -> Tensor:
        """Run the attention block where every token of the step attends to pages: `[T, H]` → `[T, H]`."""
        assert step.decode is not None
        q, k, v = self.project(hidden, gqa, step.positions)
        self.scatter_pa_kv_cache(k, v, cache, step.positions.slots)
        return self.output(self.fused_infer_attention_paged(q, cache, step.decode, gqa.config.softmax_scale), gqa)

    def output(self, attended: Tensor, gqa: Gqa) -> Tensor:
        """Apply the output projection: `[T, N, d]` of this rank's heads → `[T, H]`, of all heads."""
        return self.products.row_parallel(attended.flatten(1), gqa.o)

    def _norm_heads(self, x: Tensor, gain: Tensor, config: GqaConfig) -> Tensor:
        rows = self.norms.rms_norm(x.reshape(-1, config.head_dim), gain, config.rms_norm_eps)
        return rows.view(x.shape)

    def _rotate(self, x: Tensor, config: GqaConfig, positions: Positions) -> Tensor:
        if config.rope_dim == config.head_dim:
            return self.rotary.rotary_mul(x, positions.cos, positions.sin)
        rotary, rest = x.split([config.rope_dim, config.head_dim - config.rope_dim], dim=-1)
        return torch.cat([self.rotary.rotary_mul(rotary, positions.cos, positions.sin), rest], dim=-1)
