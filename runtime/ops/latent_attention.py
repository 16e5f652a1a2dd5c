"""Multi-head latent attention: absorbed on the paged cache, and over decompressed keys and values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ArtifactError
from ..attention.pools import LayerCache
from ..ranks.division import Division
from .handles import (
    Activation,
    Keys,
    Linear,
    LinearPart,
    Mla,
    MlaConfig,
    MlaParts,
    MlaWeights,
    Projection,
    Queries,
    own,
)
from .norms import Norms
from .products import Products
from .rotary import Rotary
from .steps import Decode, Lengths, Positions, Step
from .weights import Weights

LATENT, ROPE = "latent", "rope"
"""Pools of the cache."""


class LatentAttention(ABC):
    """Operators of multi-head latent attention, and composites of them with products, norms and rope.

    dtype: the compute dtype. most_queries: of one sequence in an entry of `Decode`; None: any number. absorbs_chunks:
    absorbed attention to chunks is as fast as its arithmetic says.
    """

    most_queries: int | None = None
    absorbs_chunks = False

    def __init__(self, dtype: torch.dtype, weights: Weights, norms: Norms, products: Products, rotary: Rotary):
        self.dtype, self.weights, self.norms, self.products, self.rotary = dtype, weights, norms, products, rotary

    @abstractmethod
    def kv_rmsnorm_rope_cache(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Normalise the latent, rotate the rope channels, write both into the cache in place.

        kv `[T, L + D]` (a view with a row stride is fine), gamma `[L]`. Norm and rope in float32 with one rounding
        each. With `output_kv` returns (k_rope `[T, D]`, latent `[T, L]`) as the cache holds them, code · scale of an
        int8 cache: tokens of the same chunk then see the same keys and values as later tokens. Where
        `with_cache_scale` folds the scales into the weights, latents are codes.
        """

    @abstractmethod
    def fused_infer_attention(
        self, queries: Queries, keys: Keys, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Multi-head attention over ragged sequences ("TND") → (out `[T, N, v]`, log-sum-exp float32 `[T, N, 1]`).

        Softmax in float32; a row that sees no key gives 0 and −inf.
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

    def norm(
        self, x: Tensor | None, residual: Tensor, gamma: Tensor, eps: float, mla: Mla
    ) -> tuple[Activation, Tensor]:
        """Normalise x + residual before attention, for `project` or `prolog`: (normed, x + residual).

        x is None before the first layer. A backend may return quantized rows, where `mla` takes them.
        """
        if x is None:
            return self.norms.rms_norm(residual, gamma, eps), residual
        return self.norms.add_rms_norm(x, residual, gamma, eps)

    def load(self, parts: MlaParts, config: MlaConfig) -> Mla:
        """Make the handle of one layer. Override to lay weights out for a fused prolog."""
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
            kv_b=self.weights.float_linear([parts.kv_b], [_kv_b_rows(parts.o, config)]),
            w_uk=self.weights.parameter(w_uk),
            w_uv=self.weights.parameter(w_uv.transpose(1, 2)),
            o=self.weights.row_parallel_of(parts.o),
        )

    def with_cache_scale(self, mla: Mla, scale: Tensor) -> Mla:
        """Make the handle for an int8 cache. scale: float32 `[L]`, a code's step in each channel of the latent.

        Override to fold the scale into the weights; here the cache keeps it, and `mla` is returned.
        """
        return mla

    def project(self, hidden: Activation, mla: Mla, reader: Linear | None = None) -> Projection:
        """Project `[T, H]` to queries and keys.

        reader: a linear besides q_b that reads the latent of the queries; q_latent is in a form that it takes.
        """
        weights = own(mla, MlaWeights)
        config = weights.config
        q_width = config.heads * config.qk_head_dim if config.q_lora_rank is None else config.q_lora_rank
        if len(weights.qkv_a) == 1:
            q, kv = self.products.linear(hidden, weights.qkv_a[0]).split(
                [q_width, config.kv_lora_rank + config.qk_rope_head_dim], dim=-1
            )
        else:
            q, kv = (self.products.linear(hidden, linear) for linear in weights.qkv_a)
        q_latent = None
        if weights.q_b is not None and weights.q_a_norm is not None:
            q_latent = self.norms.rms_norm(q, weights.q_a_norm, config.rms_norm_eps)
            q = self.products.linear(q_latent, weights.q_b)
        heads = q.unflatten(-1, (config.heads, config.qk_head_dim))
        q_nope, q_rope = heads.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return Projection(q_nope, q_rope, kv, q_latent)

    def project_kv(self, hidden: Activation, mla: Mla) -> Tensor:
        """Compute `project`'s kv `[T, L + D]` alone, without the queries where they are not fused with it."""
        weights = own(mla, MlaWeights)
        width = weights.config.kv_lora_rank + weights.config.qk_rope_head_dim
        return self.products.linear(hidden, weights.qkv_a[-1])[:, -width:]

    def prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        """Project, rotate, write the cache and absorb: the steps before absorbed attention if every token decodes.

        hidden `[T, H]` → (q_latent `[T, N, L]`, q_rope `[T, N, D]`).
        """
        return self.prolog_with_latent(hidden, mla, cache, step, None)[:2]

    def prolog_with_latent(
        self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step, reader: Linear | None
    ) -> tuple[Tensor, Tensor, Activation | None]:
        """As `prolog`, and the latent of the queries for `reader`, as in `project`."""
        q_nope, q_rope, kv, q_latent = self.project(hidden, mla, reader)
        self.write_cache(kv, mla, cache, step.positions, output_kv=False)
        rotated = self.rotary.interleave_rope(q_rope, step.positions.cos, step.positions.sin)
        return self.absorb(q_nope, mla), rotated, q_latent

    def decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> Tensor:
        """Run the attention block if every token of the step decodes, and write the cache: `[T, H]` → `[T, H]`."""
        assert step.decode is not None
        q_latent, q_rope = self.prolog(hidden, mla, cache, step)
        scale = mla.config.softmax_scale
        attended = self.fused_infer_attention_paged(q_latent, q_rope, cache, step.decode, scale)
        return self.output(self.bring_out(attended, mla), mla)

    def write_cache(
        self, kv: Tensor, mla: Mla, cache: LayerCache, positions: Positions, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Write the cache by `kv_rmsnorm_rope_cache`, with the layer's own norm."""
        return self.kv_rmsnorm_rope_cache(kv, mla.kv_a_norm, mla.config.rms_norm_eps, positions, cache, output_kv)

    def absorb(self, q_nope: Tensor, mla: Mla) -> Tensor:
        """Bring queries into latent space: `[T, N, nope]` → `[T, N, L]`."""
        return self.products.batch_matmul(q_nope, mla.w_uk)

    def decompress(self, latent: Tensor, k_rope: Tensor, mla: Mla) -> Keys:
        """Decompress keys and values of normalised latents `[S, L]`, with their rope keys `[S, D]`."""
        weights = own(mla, MlaWeights)
        config = weights.config
        kv = self.products.linear(latent, weights.kv_b).unflatten(-1, (config.heads, -1))
        k_nope, value = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return Keys(k_nope, k_rope, value)

    def bring_out(self, attended: Tensor, mla: Mla) -> Tensor:
        """Bring absorbed attention out of latent space: `[T, N, L]` → `[T, N, v]`."""
        return self.products.batch_matmul(attended, mla.w_uv)

    def output(self, attended: Tensor, mla: Mla) -> Tensor:
        """Apply the output projection: `[T, N, v]` of this rank's heads → `[T, H]`, of all heads."""
        return self.products.row_parallel(attended.flatten(1), mla.o)


def _kv_b_rows(o: LinearPart, config: MlaConfig) -> Division | None:
    """The division of kv_b's rows: of as many heads a rank as that of o's inputs."""
    if o.input_division is None:
        return None
    width = config.qk_nope_head_dim + config.v_head_dim
    return Division(o.input_division.group, tuple(size // config.v_head_dim * width for size in o.input_division.sizes))
