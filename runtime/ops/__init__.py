"""The operators a backend provides, and the values that pass between them and the model.

The model (`runtime/model.py`) is written once against `Ops`. Operators carry the names and the semantics of the NPU's
own (`npu_rms_norm`, `npu_kv_rmsnorm_rope_cache`, …) and come in two sizes:

* **small operators** have no body here: every backend implements them. One method is one device call;
* **composites** (`mla_prolog`, `moe_experts`, `mlp`, …) have a body made of small operators, which is also their
  specification. A backend that has one kernel for the whole of it overrides the composite.

Backends: `reference.ReferenceOps` (plain torch, the specification), `cpu.CpuOps` (memory-mapped weights),
`ascend.AscendOps` (torch_npu).

Shapes: T tokens of the step, N heads, H hidden size, K input features, E experts, k experts a token, R = T·k routed
rows, L = kv_lora_rank, D = qk_rope_head_dim. "compute dtype" is `Ops.dtype`; scales are always float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ...errors import ArtifactError
from ...quant.schemes import Scheme
from ...quant.static_w8a8 import InputScale

Linear: TypeAlias = Any
"""Opaque: one or several linears fused along their outputs, laid out as the backend likes."""

Experts: TypeAlias = Any
"""Opaque: the same linear (or fused gate|up) of every expert of a layer, for one grouped matmul."""

Router: TypeAlias = Any
"""Opaque: the router's weight, multiplied in float32."""

Mla: TypeAlias = Any
"""Opaque: the attention weights of a layer. `MlaWeights` unless a backend overrides `Ops.mla`."""


class Quantized(NamedTuple):
    """Rows quantized per token: `codes` int8 `[rows, K]`, `scale` float32 `[rows]`; value = codes · scale."""

    codes: Tensor
    scale: Tensor


Activation: TypeAlias = Tensor | Quantized
"""What a linear takes: rows in the compute dtype, or rows already quantized."""


@dataclass(frozen=True)
class Static:
    """What a W8A8 linear with a static input scale has: its activations become clamp(round(x / scale + offset)).

    deq_scale: float32 `[N]`, the product's scale; quant_bias: int32 `[N]`, added to the integer product before it.
    """

    inputs: InputScale
    deq_scale: Tensor
    quant_bias: Tensor


@dataclass(frozen=True)
class LinearPart:
    """One linear as it is stored; tensors are memory-mapped and must not be written to.

    weight: FLOAT: float `[N, K]` (bf16, fp16 or fp32); W8A8_DYNAMIC and W8A8: int8 `[N, K]`; W4A8_DYNAMIC: int8
    `[N/2, K]`, byte `[j, k]` holding row 2j in the low and row 2j+1 in the high nibble.
    scale: float32 `[N, 1]`, None for FLOAT and W8A8.
    scale_bias: float32 `[N, 1]` or `[N, 16]` (partial sums over K, to be added), only for W4A8_DYNAMIC.
    static: only for W8A8.
    """

    name: str
    scheme: Scheme
    weight: Tensor
    scale: Tensor | None = None
    scale_bias: Tensor | None = None
    static: Static | None = None


@dataclass(frozen=True)
class MlaConfig:
    """Sizes and constants of multi-head latent attention; `q_lora_rank` is None in models without q_a/q_b."""

    num_heads: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    q_lora_rank: int | None
    rms_norm_eps: float
    softmax_scale: float

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim


@dataclass(frozen=True)
class MlaParts:
    """The stored attention weights of one layer, from which `Ops.mla` makes its handle.

    q_a, q_b and q_a_norm (float `[q_lora]`) are None, and q set, in models without q_lora; otherwise q is None.
    kv_b is float `[N·(nope+v), L]`; kv_a_norm is float `[L]`.
    """

    q: LinearPart | None
    q_a: LinearPart | None
    q_a_norm: Tensor | None
    q_b: LinearPart | None
    kv_a: LinearPart
    kv_a_norm: Tensor
    kv_b: Tensor
    o: LinearPart


@dataclass(frozen=True)
class MlaWeights:
    """The default attention handle.

    qkv_a: one fused linear for (q_a or q | kv_a), or two where their schemes differ.
    w_uk: `[N, nope, L]`, absorbs a query into latent space; w_uv: `[N, L, v]`, brings attention out of it.
    """

    config: MlaConfig
    qkv_a: tuple[Linear, ...]
    q_a_norm: Tensor | None
    q_b: Linear | None
    kv_a_norm: Tensor
    kv_b: Linear
    w_uk: Tensor
    w_uv: Tensor
    o: Linear


@dataclass(frozen=True)
class Gating:
    """How a router's logits become k experts and their weights.

    scoring: "sigmoid" or "softmax". group_count groups of E/group_count neighbours, of which the best `k_group` stay;
    a group's score is the sum of its two best (group_select_mode 1) or its best (mode 0) biased score.
    renormalize: divide the k weights by (their sum + 1e-20). scaling: then multiply by this.
    """

    k: int
    scoring: str
    group_count: int = 1
    k_group: int = 1
    group_select_mode: int = 0
    renormalize: bool = False
    scaling: float = 1.0


@dataclass(frozen=True)
class MoeWeights:
    """The routed experts of one layer: `gate_up` gives `[R, 2·I]` with gate in the left half, `down` gives `[R, H]`."""

    router: Router
    correction_bias: Tensor | None  # float32 [E]; only for selection, never in the weights
    gating: Gating
    gate_up: Experts
    down: Experts
    num_experts: int
    quantized: bool  # both linears take int8 activations


@dataclass(frozen=True)
class MlpWeights:
    """A dense or shared feed-forward block: `gate_up` gives `[T, 2·I]` with gate in the left half."""

    gate_up: Linear
    down: Linear
    quantized: bool  # down takes rows quantized per token


@dataclass(frozen=True)
class LayerCache:
    """One layer's paged cache, written in place.

    latent `[blocks, L/16, block_size, 16]` and rope `[blocks, D/16, block_size, 16]` in the compute dtype, bytes as
    `npu_kv_rmsnorm_rope_cache` writes them with `cache_mode="PA_NZ"`: channel d of the token at slot s is
    `[s // block_size, d // 16, s % block_size, d % 16]`. A backend set to the ND layout keeps
    `[blocks, block_size, 1, L]` and `[blocks, block_size, 1, D]` instead.

    latent_scale: None, or float `[L]` on the device: then the latent is int8 in tiles of 32 channels, `[blocks, L/32,
    block_size, 32]`, its codes those of `quant.kv_cache.latent_codes`, and code · scale is the channel's value. It is
    float32, or the compute dtype, which holds the same numbers.
    """

    latent: Tensor
    rope: Tensor
    block_size: int
    latent_scale: Tensor | None = None


@dataclass(frozen=True)
class Decode:
    """The part of a step that attends in absorbed form: its tokens come first in the step.

    q_lens: cumulative query lengths without a leading 0 (all ones summed, unless tokens are speculated).
    kv_lens: tokens of each sequence, those of this step included (not cumulative).
    block_table: int32 `[sequences, max_blocks]` on the device; entries past a sequence's blocks are 0, never read.
    """

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    block_table: Tensor

    @property
    def num_tokens(self) -> int:
        return self.q_lens[-1]


@dataclass(frozen=True)
class PrefixSegment:
    """Cached tokens `[start, start + length)` of one sequence; `start` is a multiple of the block size.

    block_table: int32 `[1, blocks]` on the device: the blocks that hold the segment, beginning at `start`.
    """

    start: int
    length: int
    block_table: Tensor


@dataclass(frozen=True)
class Prefix:
    """What a prefill chunk that is not its sequence's first attends to besides itself.

    rows: first and past-the-last row of the chunk, counted from the first prefill row of the step.
    """

    rows: tuple[int, int]
    segments: tuple[PrefixSegment, ...]


@dataclass(frozen=True)
class Prefill:
    """The part of a step that attends over decompressed keys and values; its tokens follow those of `Decode`.

    q_lens: cumulative lengths of the chunks, without a leading 0. Within the step keys have the same lengths.
    """

    q_lens: tuple[int, ...]
    prefixes: tuple[Prefix, ...]

    @property
    def num_tokens(self) -> int:
        return self.q_lens[-1]


@dataclass(frozen=True)
class Step:
    """One pass through the model, built once and shared by all layers. Lengths are host values, tensors on the device.

    token_ids, positions, slots: int64 `[T]`; slot = block · block_size + offset, where the token's latent goes.
    cos, sin: compute dtype `[T, D]`, gathered rows of the rope tables with the halves duplicated.
    output_rows: int64 `[S]`, the rows whose logits are wanted; None for all.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor
    decode: Decode | None
    prefill: Prefill | None
    output_rows: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_decode_tokens(self) -> int:
        return self.decode.num_tokens if self.decode else 0


class Ops(ABC):
    """A set of operators: how one backend computes.

    name: "reference", "cpu" or "ascend". dtype: the compute dtype. device: where a step's tensors live.
    """

    name: str
    dtype: torch.dtype
    device: torch.device

    @property
    def has_int8_cache(self) -> bool:
        """Whether `new_kv_cache` takes scales."""
        return True

    def one_thread(self) -> AbstractContextManager[None]:
        """Torch's own operators inside work on the calling thread alone, where this set has threads of its own.

        Torch's threads stay awake for a while after each operator they shared, on the cores that the set's want next.
        """
        return nullcontext()

    # ---- at load: stored weights become handles -------------------------------------------------------------------

    @abstractmethod
    def float_linear(self, weights: Sequence[Tensor]) -> Linear:
        """Fuse float `[N_i, K]` weights (stored dtype) along their outputs: x `[T, K]` → `[T, ΣN_i]`."""

    @abstractmethod
    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse W8A8 parts (`weight` int8 `[N_i, K]`, `scale` float32 `[N_i, 1]`) along their outputs."""

    @abstractmethod
    def static_linear(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse W8A8 parts (`weight` int8 `[N_i, K]`, `static` with one InputScale for all) along their outputs."""

    @abstractmethod
    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """For each expert the FLOAT parts to fuse along their outputs (gate, up) or (down,)."""

    @abstractmethod
    def w8a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """For each expert the W8A8 parts to fuse along their outputs."""

    @abstractmethod
    def w4a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """For each expert the W4A8 parts to fuse along their outputs; the N_i are even."""

    @abstractmethod
    def router(self, weight: Tensor) -> Router:
        """The router's float `[E, H]` weight."""

    @abstractmethod
    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A small tensor (norm gain, router bias, rope table) or the embedding, on the device; dtype None keeps it."""

    @abstractmethod
    def new_kv_cache(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        kv_lora_rank: int,
        rope_dim: int,
        latent_scales: Sequence[Tensor] | None = None,
    ) -> tuple[LayerCache, ...]:
        """Allocate the paged cache of every layer; with scales (float32 `[L]` a layer) its latent is int8.

        Raises BackendError for a setting that the backend's operators do not take.
        """

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

    # ---- norms and activations -------------------------------------------------------------------------------------

    @abstractmethod
    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Rows of `table` `[vocab, H]` (stored dtype), in the compute dtype: `[T, H]`."""

    @abstractmethod
    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        """x · rsqrt(mean(x²) + eps) · gamma over the last dimension, float32 inside, rounded once."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), both `[T, H]`. bf16: normalised sum is rounded before it is times gamma."""

    @abstractmethod
    def swiglu(self, x: Tensor) -> Tensor:
        """silu(left half) · right half: `[rows, 2·I]` → `[rows, I]`, float32 inside."""

    @abstractmethod
    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        """Per row: f = 127 / max|x|, codes = round-half-even(x · f), scale = 1 / f. A zero row gives zeros.

        With `smooth`, float `[K]`, of x · smooth instead, in float32.
        """

    @abstractmethod
    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        """y = swiglu(x) in float32, then per row scale = max|y| / 127, codes = round-half-even(y / scale)."""

    # ---- matmuls ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def linear(self, x: Activation, linear: Linear) -> Tensor:
        """x `[rows, K]` times a handle of one of the `…_linear` methods → `[rows, N]` in the compute dtype.

        A W8A8 handle takes a `Quantized`, or quantizes a tensor with `dynamic_quant` first; the result is
        float32(int32 accumulator) · scale[n] · token_scale[m], in this order in float32, rounded once.
        A FLOAT handle takes a tensor only, and so does a static W8A8 one. That quantizes it, in float32, to
        clamp(round-half-even(x · f + offset)), f = 1 / scale in the compute dtype; the result is
        float32(int32 accumulator + quant_bias[n]) · deq_scale[n], rounded once.
        """

    @abstractmethod
    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        """x `[T, H]` times the router in float32 → float32 `[T, E]`."""

    @abstractmethod
    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """One matrix a head: x `[T, N, A]`, weight `[N, A, B]` → `[T, N, B]` in the compute dtype."""

    @abstractmethod
    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        """Rows of x sorted by expert, `group_list` int64 `[E]` the number of rows of each → `[R, N]`, compute dtype.

        Quantized handles take a `Quantized` (consumed: the device may overwrite its codes), float ones a tensor.
        Numerics as in `linear`; rows past the sum of `group_list` are undefined.
        """

    # ---- routing ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        """logits float32 `[T, E]`, bias float32 `[E]` → (weights float32 `[T, k]`, expert ids int32 `[T, k]`).

        In order of descending biased score, the lower index first among equals. All in float32.
        """

    @abstractmethod
    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        """Sort the T·k copies of the tokens by expert (stable).

        x `[T, H]`, expert_ids int32 `[T, k]` → (rows `[R, H]`; row_index int32 `[R]`, where flat copy t·k + j went;
        group_list int64 `[E]`, the number of rows of each expert). With `quantize` the rows come quantized per row:
        scale = max|x| / 127, codes = round-half-away(x / scale); a zero row gives zeros.
        """

    @abstractmethod
    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        """out[t] = skip[t] + Σ_j weights[t, j] · rows[row_index[t·k + j]] → `[T, H]`, float32 inside, rounded once.

        weights float32 `[T, k]` (rounded to the compute dtype first), skip `[T, H]` or None (the shared experts).
        """

    # ---- attention -------------------------------------------------------------------------------------------------

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
        Norm and rope in float32 with one rounding each. With `output_kv` returns (k_rope `[T, D]`, latent `[T, L]`),
        also where the cache is int8: the codes that it stores are made of this latent.
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
    def gather_pa_kv_cache(self, cache: LayerCache, segment: PrefixSegment) -> tuple[Tensor, Tensor]:
        """Copy a segment of cached tokens out of the pages: (latent `[length, L]`, k_rope `[length, D]`), both in the
        compute dtype."""

    @abstractmethod
    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        """Merge attention over disjoint key sets: w_i = exp(lse_i − max), out = Σ w_i · o_i / Σ w_i in float32.

        outputs: each `[T, N, v]`; lses: each float32 `[T, N, 1]`.
        """

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
