"""Multi-head latent attention on a paged cache, and attention over decompressed keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...errors import ArtifactError
from ..attention.pools import LayerCache, Layout, Pages, Pool, StoredPool, stored_pools
from .handles import Activation, Mla, MlaConfig, MlaParts, MlaWeights, own
from .norms import Norms
from .products import Products
from .steps import Decode, PrefixSegment, Step
from .weights import Weights

LATENT, ROPE = "latent", "rope"
"""Pools of the cache of multi-head latent attention."""

NO_SCALES: Mapping[str, Tensor] = {}


class Attention(ABC):
    """Attention operators, and composites of them with products and norms.

    dtype: the compute dtype. kv_layout: layout of pools for which the kind of attention names none.
    """

    kv_layout: Layout = "nz"

    def __init__(self, dtype: torch.dtype, weights: Weights, norms: Norms, products: Products):
        self.dtype, self.weights, self.norms, self.products = dtype, weights, norms, products

    @abstractmethod
    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate interleaved pairs, half-split output: x `[T, N, D]`, cos/sin `[T, D]` → `[T, N, D]`.

        u = the even channels then the odd ones; out = u · cos + (−second half, first half of u) · sin.
        """

    @abstractmethod
    def kv_rmsnorm_rope_cache(
        self,
        kv: Tensor,
        gamma: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        cache: LayerCache,
        eps: float,
        output_kv: bool,
    ) -> tuple[Tensor, Tensor] | None:
        """Normalise the latent, rotate the rope channels, write both into the cache in place.

        kv `[T, L + D]` (a view with a row stride is fine), gamma `[L]`, slots int64 `[T]` (negative: not written).
        Norm and rope in float32 with one rounding each. With `output_kv` returns (k_rope `[T, D]`, latent `[T, L]`) as
        the cache holds them, code · scale of an int8 cache: tokens of the same chunk then see the same keys and values
        as later tokens.
        """

    @abstractmethod
    def fused_infer_attention(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        value: Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        """Multi-head attention over ragged sequences ("TND") → (out `[T, N, v]`, log-sum-exp float32 `[T, N, 1]`).

        q_nope `[T, N, nope]`, q_rope `[T, N, D]`, k_nope `[S, N, nope]`, k_rope `[S, D]` (shared by the heads), value
        `[S, N, v]`; q_lens and kv_lens are cumulative without a leading 0. causal: query i of a sequence sees keys
        j ≤ i + (kv length − query length). Softmax in float32; a row that sees no key gives 0 and −inf.
        """

    @abstractmethod
    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        """Absorbed attention on the paged cache, the latent being both key and value: `[T, N, L]`.

        q_latent `[T, N, L]`, q_rope `[T, N, D]`. Causal within a sequence, aligned at the end. With an int8 cache the
        latent query is multiplied by the channels' scales and quantized, per token and head, as `dynamic_quant` does.
        """

    @abstractmethod
    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        """Merge attention over disjoint key sets: w_i = exp(lse_i − max), out = Σ w_i · o_i / Σ w_i in float32.

        outputs: each `[T, N, v]`; lses: each float32 `[T, N, 1]`.
        """

    @abstractmethod
    def zeros(self, pool: StoredPool, num_blocks: int, block_size: int) -> Tensor:
        """Allocate the tensor of a pool, zeros of `pool.shape(num_blocks, block_size)`."""

    def new_cache(
        self, pools: Sequence[Pool], num_blocks: int, block_size: int, scales: Mapping[str, Tensor] = NO_SCALES
    ) -> LayerCache:
        """Allocate the paged cache of a layer. Pools that have scales (float32 `[channels]`, by name) are int8.

        Raises BackendError for a setting that the backend's operators do not take.
        """
        return LayerCache(
            {
                pool.name: Pages(pool, self.zeros(pool, num_blocks, block_size), scales.get(pool.name))
                for pool in self.stored(pools, scales)
            },
            block_size,
        )

    def stored(self, pools: Sequence[Pool], scales: Mapping[str, Tensor] = NO_SCALES) -> tuple[StoredPool, ...]:
        """Pools of a layer as `new_cache` makes them."""
        return stored_pools(pools, self.dtype, self.kv_layout, scales)

    def gather_pa_kv_cache(self, cache: LayerCache, segment: PrefixSegment) -> dict[str, Tensor]:
        """Copy a segment of cached tokens out of the pages: by pool, float `[length, channels]`, codes decoded."""
        # npu_gather_pa_kv_cache recognises NZ pages by the tensor's format, which a cache must not have.
        gathered = {name: pages.read(segment.block_table[0], segment.length) for name, pages in cache.pages.items()}
        for name, pages in cache.pages.items():
            if pages.scale is not None:
                gathered[name] = (gathered[name] * pages.scale).to(self.dtype)
        return gathered

    @property
    def has_int8_cache(self) -> bool:
        """True if `new_cache` takes scales."""
        return True

    def attention_norm(
        self, x: Tensor | None, residual: Tensor, gamma: Tensor, eps: float, mla: Mla
    ) -> tuple[Activation, Tensor]:
        """Normalise x + residual before attention, for `mla_project` or `mla_prolog`: (normed, x + residual).

        x is None before the first layer. A backend may return quantized rows, where `mla` takes them.
        """
        if x is None:
            return self.norms.rms_norm(residual, gamma, eps), residual
        return self.norms.add_rms_norm(x, residual, gamma, eps)

    def mla(self, parts: MlaParts, config: MlaConfig) -> Mla:
        """Make the attention handle of one layer. Override to lay weights out for a fused prolog."""
        first = parts.q if parts.q_a is None else parts.q_a
        if first is None:
            raise ArtifactError(f"{parts.kv_a.name}: the layer has neither q nor q_a")
        groups = self.weights.fusible([first, parts.kv_a])
        heads = parts.kv_b.view(config.heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
        w_uk, w_uv = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return MlaWeights(
            config=config,
            qkv_a=tuple(self.weights.linear_of(group) for group in groups),
            q_a_norm=None if parts.q_a_norm is None else self.weights.parameter(parts.q_a_norm, self.dtype),
            q_b=None if parts.q_b is None else self.weights.linear_of([parts.q_b]),
            kv_a_norm=self.weights.parameter(parts.kv_a_norm, self.dtype),
            kv_b=self.weights.float_linear([parts.kv_b]),
            w_uk=self.weights.parameter(w_uk),
            w_uv=self.weights.parameter(w_uv.transpose(1, 2)),
            o=self.weights.linear_of([parts.o]),
        )

    def mla_project(self, hidden: Activation, mla: Mla) -> tuple[Tensor, Tensor, Tensor]:
        """Project `[T, H]` → (q_nope `[T, N, nope]`, q_rope `[T, N, D]`, kv `[T, L + D]`), before norm and rope."""
        weights = own(mla, MlaWeights)
        config = weights.config
        q_width = config.heads * config.qk_head_dim if config.q_lora_rank is None else config.q_lora_rank
        if len(weights.qkv_a) == 1:
            q, kv = self.products.linear(hidden, weights.qkv_a[0]).split(
                [q_width, config.kv_lora_rank + config.qk_rope_head_dim], dim=-1
            )
        else:
            q, kv = (self.products.linear(hidden, linear) for linear in weights.qkv_a)
        if weights.q_b is not None and weights.q_a_norm is not None:
            q = self.products.linear(self.norms.rms_norm(q, weights.q_a_norm, config.rms_norm_eps), weights.q_b)
        heads = q.unflatten(-1, (config.heads, config.qk_head_dim))
        q_nope, q_rope = heads.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, q_rope, kv

    def mla_kv(self, hidden: Activation, mla: Mla) -> Tensor:
        """Compute `mla_project`'s kv `[T, L + D]` alone, without the queries where they are not fused with it."""
        weights = own(mla, MlaWeights)
        width = weights.config.kv_lora_rank + weights.config.qk_rope_head_dim
        return self.products.linear(hidden, weights.qkv_a[-1])[:, -width:]

    def mla_prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        """Project, rotate, write the cache and absorb: the steps before absorbed attention if every token decodes.

        hidden `[T, H]` → (q_latent `[T, N, L]`, q_rope `[T, N, D]`).
        """
        q_nope, q_rope, kv = self.mla_project(hidden, mla)
        self.mla_write_cache(kv, mla, cache, step, output_kv=False)
        return self.mla_absorb(q_nope, mla), self.interleave_rope(q_rope, step.cos, step.sin)

    def mla_decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> Tensor:
        """Run the attention block if every token of the step decodes, and write the cache: `[T, H]` → `[T, H]`."""
        assert step.decode is not None
        q_latent, q_rope = self.mla_prolog(hidden, mla, cache, step)
        scale = mla.config.softmax_scale
        attended = self.fused_infer_attention_paged(q_latent, q_rope, cache, step.decode, scale)
        return self.mla_output(self.mla_bring_out(attended, mla), mla)

    def mla_write_cache(
        self, kv: Tensor, mla: Mla, cache: LayerCache, step: Step, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Write the cache by `kv_rmsnorm_rope_cache`, with the layer's own norm."""
        eps = mla.config.rms_norm_eps
        return self.kv_rmsnorm_rope_cache(kv, mla.kv_a_norm, step.cos, step.sin, step.slots, cache, eps, output_kv)

    def mla_absorb(self, q_nope: Tensor, mla: Mla) -> Tensor:
        """Bring queries into latent space: `[T, N, nope]` → `[T, N, L]`."""
        return self.products.batch_matmul(q_nope, mla.w_uk)

    def mla_decompress(self, latent: Tensor, mla: Mla) -> tuple[Tensor, Tensor]:
        """Decompress keys and values of normalised latents `[S, L]`: (k_nope `[S, N, nope]`, value `[S, N, v]`)."""
        weights = own(mla, MlaWeights)
        config = weights.config
        kv = self.products.linear(latent, weights.kv_b).unflatten(-1, (config.heads, -1))
        k_nope, value = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return k_nope, value

    def mla_bring_out(self, attended: Tensor, mla: Mla) -> Tensor:
        """Bring absorbed attention out of latent space: `[T, N, L]` → `[T, N, v]`."""
        return self.products.batch_matmul(attended, mla.w_uv)

    def mla_output(self, attended: Tensor, mla: Mla) -> Tensor:
        """Apply the output projection: `[T, N, v]` → `[T, H]`."""
        return self.products.linear(attended.flatten(1), mla.o)
