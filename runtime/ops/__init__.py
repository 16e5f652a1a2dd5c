"""The operators a backend provides, and the values that pass between them and the model.

The model (`runtime/model.py`) is written once against `Ops`. Operators carry the names and the semantics of the NPU's
own (`npu_rms_norm`, `npu_kv_rmsnorm_rope_cache`, …) and come in two sizes:

* **small operators** (`operators.py`) have no body: every backend implements them. One method is one device call;
* **composites** (here: `mla_prolog`, `moe_experts`, `mlp`, …) have a body made of small operators, which is also their
  specification. A backend that has one kernel for the whole of it overrides the composite.

Backends: `reference.ReferenceOps` (plain torch, the specification), `cpu.CpuOps` (memory-mapped weights),
`ascend.AscendOps` (torch_npu).

Shapes: T tokens of the step, N heads, H hidden size, K input features, E experts, k experts a token, R = T·k routed
rows, L = kv_lora_rank, D = qk_rope_head_dim. "compute dtype" is `Ops.dtype`; scales are always float32.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import ArtifactError
from ...formats.schemes import Scheme
from .operators import Operators
from .parts import (
    Activation,
    Experts,
    Gating,
    Linear,
    LinearPart,
    Mla,
    MlaConfig,
    MlaParts,
    MlaWeights,
    MlpWeights,
    MoeWeights,
    Quantized,
    Router,
    Static,
)
from .steps import Decode, LayerCache, Prefill, Prefix, PrefixSegment, Step

__all__ = [
    "Activation",
    "Decode",
    "Experts",
    "Gating",
    "LayerCache",
    "Linear",
    "LinearPart",
    "Mla",
    "MlaConfig",
    "MlaParts",
    "MlaWeights",
    "MlpWeights",
    "MoeWeights",
    "Ops",
    "Prefill",
    "Prefix",
    "PrefixSegment",
    "Quantized",
    "Router",
    "Static",
    "Step",
]


class Ops(Operators):
    """A backend's operators, small and composite."""

    # ---- at load: stored weights become handles -------------------------------------------------------------------

    def linear_of(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse parts that share one scheme. Raises ArtifactError where they do not, or where it is not a dense one."""
        schemes = {part.scheme for part in parts}
        if schemes == {Scheme.FLOAT}:
            return self.float_linear([part.weight for part in parts])
        if schemes == {Scheme.W8A8}:
            return self.w8a8_linear(parts)
        names = ", ".join(f"{part.name} ({part.scheme.value})" for part in parts)
        if schemes != {Scheme.W8A8_STATIC}:
            raise ArtifactError(f"linears that run as one must share one scheme, W8A8_DYNAMIC, W8A8 or FLOAT: {names}")
        if len({part.static.inputs for part in parts if part.static is not None}) != 1:
            raise ArtifactError(f"linears that run as one must share input_scale and input_offset: {names}")
        return self.static_linear(parts)

    def experts_of(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """Stack experts that all have one scheme. Raises ArtifactError where they do not."""
        schemes = {part.scheme for parts in experts for part in parts}
        if len(schemes) != 1:
            names = f"{experts[0][0].name} … {experts[-1][-1].name}"
            raise ArtifactError(
                f"a layer's routed experts must share one scheme, found {sorted(s.value for s in schemes)}: {names}"
            )
        if Scheme.W8A8_STATIC in schemes:
            raise ArtifactError(f"{experts[0][0].name}: routed experts cannot have a static input scale (W8A8)")
        make = {
            Scheme.FLOAT: self.float_experts,
            Scheme.W8A8: self.w8a8_experts,
            Scheme.W4A8: self.w4a8_experts,
        }[schemes.pop()]
        return make(experts)

    def mla(self, parts: MlaParts, config: MlaConfig) -> Mla:
        """The attention handle of one layer. Override to lay weights out for a fused prolog."""
        first = parts.q if parts.q_a is None else parts.q_a
        if first is None:
            raise ArtifactError(f"{parts.kv_a.name}: the layer has neither q_proj nor q_a_proj")
        fused = first.scheme == parts.kv_a.scheme
        groups = [[first, parts.kv_a]] if fused else [[first], [parts.kv_a]]
        heads = parts.kv_b.view(config.num_heads, config.qk_nope_head_dim + config.v_head_dim, config.kv_lora_rank)
        w_uk, w_uv = heads.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return MlaWeights(
            config=config,
            qkv_a=tuple(self.linear_of(group) for group in groups),
            q_a_norm=None if parts.q_a_norm is None else self.parameter(parts.q_a_norm, self.dtype),
            q_b=None if parts.q_b is None else self.linear_of([parts.q_b]),
            kv_a_norm=self.parameter(parts.kv_a_norm, self.dtype),
            kv_b=self.float_linear([parts.kv_b]),
            w_uk=self.parameter(w_uk),
            w_uv=self.parameter(w_uv.transpose(1, 2)),
            o=self.linear_of([parts.o]),
        )

    # ---- composites ------------------------------------------------------------------------------------------------

    def attention_norm(
        self, x: Tensor | None, residual: Tensor, gamma: Tensor, eps: float, mla: Mla
    ) -> tuple[Activation, Tensor]:
        """The norm before attention, whose output only feeds `mla_project` or `mla_prolog`: (normed, new residual).

        x is None before the first layer. A backend may return the rows already quantized, where `mla` takes them so.
        """
        if x is None:
            return self.rms_norm(residual, gamma, eps), residual
        return self.add_rms_norm(x, residual, gamma, eps)

    def mla_project(self, hidden: Activation, mla: Mla) -> tuple[Tensor, Tensor, Tensor]:
        """hidden `[T, H]` → (q_nope `[T, N, nope]`, q_rope `[T, N, D]`, kv `[T, L + D]`), before norm and rope."""
        weights: MlaWeights = mla
        config = weights.config
        q_width = config.num_heads * config.qk_head_dim if config.q_lora_rank is None else config.q_lora_rank
        if len(weights.qkv_a) == 1:
            q, kv = self.linear(hidden, weights.qkv_a[0]).split(
                [q_width, config.kv_lora_rank + config.qk_rope_head_dim], dim=-1
            )
        else:
            q, kv = (self.linear(hidden, linear) for linear in weights.qkv_a)
        if weights.q_b is not None and weights.q_a_norm is not None:
            q = self.linear(self.rms_norm(q, weights.q_a_norm, config.rms_norm_eps), weights.q_b)
        heads = q.unflatten(-1, (config.num_heads, config.qk_head_dim))
        q_nope, q_rope = heads.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return q_nope, q_rope, kv

    def mla_prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        """All that precedes absorbed attention when every token of the step decodes; writes the cache.

        hidden `[T, H]` → (q_latent `[T, N, L]`, q_rope `[T, N, D]`).
        """
        q_nope, q_rope, kv = self.mla_project(hidden, mla)
        self.mla_write_cache(kv, mla, cache, step, output_kv=False)
        return self.mla_absorb(q_nope, mla), self.interleave_rope(q_rope, step.cos, step.sin)

    def mla_decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step, scale: float) -> Tensor:
        """The whole attention block when every token of the step decodes; writes the cache: `[T, H]` → `[T, H]`."""
        assert step.decode is not None
        q_latent, q_rope = self.mla_prolog(hidden, mla, cache, step)
        attended = self.fused_infer_attention_paged(q_latent, q_rope, cache, step.decode, scale)
        return self.mla_output(self.mla_bring_out(attended, mla), mla)

    def mla_write_cache(
        self, kv: Tensor, mla: Mla, cache: LayerCache, step: Step, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        """`kv_rmsnorm_rope_cache` with the layer's own norm."""
        weights: MlaWeights = mla
        eps = weights.config.rms_norm_eps
        return self.kv_rmsnorm_rope_cache(kv, weights.kv_a_norm, step.cos, step.sin, step.slots, cache, eps, output_kv)

    def mla_absorb(self, q_nope: Tensor, mla: Mla) -> Tensor:
        """Queries into latent space: `[T, N, nope]` → `[T, N, L]`."""
        return self.batch_matmul(q_nope, mla.w_uk)

    def mla_decompress(self, latent: Tensor, mla: Mla) -> tuple[Tensor, Tensor]:
        """Keys and values of normalised latents `[S, L]`: (k_nope `[S, N, nope]`, value `[S, N, v]`)."""
        weights: MlaWeights = mla
        config = weights.config
        kv = self.linear(latent, weights.kv_b).unflatten(-1, (config.num_heads, -1))
        k_nope, value = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        return k_nope, value

    def mla_bring_out(self, attended: Tensor, mla: Mla) -> Tensor:
        """Absorbed attention out of latent space: `[T, N, L]` → `[T, N, v]`."""
        return self.batch_matmul(attended, mla.w_uv)

    def mla_output(self, attended: Tensor, mla: Mla) -> Tensor:
        """The output projection: `[T, N, v]` → `[T, H]`."""
        return self.linear(attended.flatten(1), mla.o)

    def mlp(self, hidden: Tensor, weights: MlpWeights) -> Tensor:
        """A dense or shared feed-forward block: `[T, H]` → `[T, H]`."""
        gate_up = self.linear(hidden, weights.gate_up)
        inner = self.dequant_swiglu_quant(gate_up) if weights.quantized else self.swiglu(gate_up)
        return self.linear(inner, weights.down)

    def moe(self, hidden: Tensor, weights: MoeWeights, shared: MlpWeights | None) -> Tensor:
        """A mixture of experts and the shared ones beside it: `[T, H]` → `[T, H]`."""
        dense = None if shared is None else self.mlp(hidden, shared)
        top_weights, expert_ids = self.moe_gate(hidden, weights)
        return self.moe_experts(hidden, top_weights, expert_ids, weights, dense)

    def moe_gate(self, hidden: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        """The router: hidden `[T, H]` → (weights float32 `[T, k]`, expert ids int32 `[T, k]`)."""
        logits = self.router_logits(hidden, weights.router)
        return self.moe_gating_top_k(logits, weights.correction_bias, weights.gating)

    def moe_experts(
        self, hidden: Tensor, top_weights: Tensor, expert_ids: Tensor, weights: MoeWeights, shared: Tensor | None
    ) -> Tensor:
        """The chosen experts of every token, weighted, plus `shared` `[T, H]`: `[T, H]` → `[T, H]`."""
        rows, row_index, group_list = self.moe_init_routing(
            hidden, expert_ids, weights.num_experts, quantize=weights.quantized
        )
        gate_up = self.grouped_matmul(rows, weights.gate_up, group_list)
        inner = self.dequant_swiglu_quant(gate_up) if weights.quantized else self.swiglu(gate_up)
        out = self.grouped_matmul(inner, weights.down, group_list)
        return self.moe_finalize_routing(out, top_weights, row_index, expert_ids, shared)
