"""The CPU's operators on native kernels: memory-mapped weights are used as they are stored, by one pool of threads.

Integers equal the reference's; floats differ in the last bits (order of additions, exp). Operators that no step spends
time in stay torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import BackendError
from ...quant.native import DTYPES, MoeBlock, Pool
from ...quant.schemes import Scheme
from . import (
    Activation,
    Decode,
    Experts,
    Gating,
    LayerCache,
    Linear,
    LinearPart,
    Mla,
    MlaConfig,
    MlaParts,
    MlpWeights,
    MoeWeights,
    Quantized,
    Router,
    Step,
)
from .cpu import CpuOps
from .native_weights import NativeLinear, NativeMla, native_cache, native_heads, native_linear, native_mla, native_moe
from .reference import PartsLinear


class NativeOps(CpuOps):
    """CpuOps with its inner loops in C. dtype is float32 or bfloat16."""

    def __init__(self, dtype: torch.dtype = torch.float32, threads: int | None = None, level: str | None = None):
        super().__init__(dtype)
        if dtype not in (torch.float32, torch.bfloat16):
            raise BackendError(f"the native kernels compute in float32 or bfloat16, not {dtype}")
        self.pool = Pool(threads, level)
        self._code = DTYPES[dtype]
        # By identity; what the key names is kept beside the block, so that no other object can come to have its name.
        self._moe_blocks: dict[tuple[int, int], tuple[MoeBlock | None, MoeWeights, MlpWeights | None]] = {}

    # ---- at load ---------------------------------------------------------------------------------------------------

    def float_linear(self, weights: Sequence[Tensor]) -> Linear:
        return native_linear([[LinearPart("", Scheme.FLOAT, weight) for weight in weights]])

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return native_linear([parts])

    def static_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return PartsLinear(tuple(parts))

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return native_linear(experts)

    w8a8_experts = float_experts
    w4a8_experts = float_experts

    def router(self, weight: Tensor) -> Router:
        return native_linear([[LinearPart("router", Scheme.FLOAT, weight)]])

    # ---- norms and activations -------------------------------------------------------------------------------------

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        x = _rows(x)
        out = torch.empty(x.shape, dtype=self.dtype)
        gamma = gamma.to(self.dtype).contiguous()
        rows, cols = x.shape
        self.pool.call(
            "rms_norm", x.data_ptr(), self._code, x.stride(0), gamma.data_ptr(), rows, cols, eps, out.data_ptr()
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual = x.contiguous(), residual.contiguous()
        out, total = torch.empty_like(x), torch.empty_like(x)
        gamma = gamma.to(self.dtype).contiguous()
        self.pool.call(
            "add_rms_norm",
            x.data_ptr(),
            residual.data_ptr(),
            self._code,
            gamma.data_ptr(),
            *x.shape,
            eps,
            out.data_ptr(),
            total.data_ptr(),
        )
        return out, total

    def swiglu(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, half = x.shape[0], x.shape[1] // 2
        out = torch.empty(rows, half, dtype=self.dtype)
        self.pool.call("swiglu", x.data_ptr(), self._code, rows, half, out.data_ptr())
        return out

    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        if smooth is not None:
            return super().dynamic_quant(x, smooth)
        x = _rows(x)
        rows, cols = x.shape
        codes, scale = torch.empty(rows, cols, dtype=torch.int8), torch.empty(rows)
        self.pool.call(
            "dynamic_quant", x.data_ptr(), self._code, x.stride(0), rows, cols, codes.data_ptr(), scale.data_ptr()
        )
        return Quantized(codes, scale)

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        x = x.contiguous()
        rows, half = x.shape[0], x.shape[1] // 2
        codes, scale = torch.empty(rows, half, dtype=torch.int8), torch.empty(rows)
        self.pool.call("swiglu_quant", x.data_ptr(), self._code, rows, half, codes.data_ptr(), scale.data_ptr())
        return Quantized(codes, scale)

    # ---- matmuls ---------------------------------------------------------------------------------------------------

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        if isinstance(linear, PartsLinear):  # static W8A8, which is torch's
            return super().linear(x, linear)
        handle: NativeLinear = linear
        if isinstance(x, Quantized):
            return self._matmul(x, handle, None)
        return self._linear(x, handle, self.dtype)

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return self._linear(x, router, torch.float32)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        handle: NativeLinear = experts
        if handle.quantized and not isinstance(x, Quantized):
            x = self.dynamic_quant(x)
        return self._matmul(x, handle, group_list)

    def _linear(self, x: Tensor, handle: NativeLinear, dtype: torch.dtype) -> Tensor:
        x, weights = _rows(x) if handle.quantized else x.contiguous(), handle.weights
        _check_width(x, handle)
        out = torch.empty(x.shape[0], weights.outputs, dtype=dtype)
        self.pool.call(
            "linear",
            handle.address,
            x.data_ptr(),
            DTYPES[x.dtype],
            x.stride(0),
            x.shape[0],
            out.data_ptr(),
            DTYPES[dtype],
        )
        return out

    def _matmul(self, x: Activation, handle: NativeLinear, group_list: Tensor | None) -> Tensor:
        if isinstance(x, Quantized) and not handle.quantized:
            raise BackendError(f"{handle.name}: a float linear was given quantized rows")
        rows, scale = (
            (x.codes.contiguous(), x.scale.contiguous()) if isinstance(x, Quantized) else (x.contiguous(), None)
        )
        _check_width(rows, handle)
        out = torch.empty(rows.shape[0], handle.weights.outputs, dtype=self.dtype)
        self.pool.call(
            "matmul",
            handle.address,
            rows.data_ptr(),
            DTYPES[rows.dtype],
            None if scale is None else scale.data_ptr(),
            None if group_list is None else group_list.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
            self._code,
        )
        return out

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens, heads, a = x.shape
        b = weight.shape[2]
        if 1 not in weight.stride()[1:] or x.stride(2) != 1:
            return super().batch_matmul(x, weight)
        out = torch.empty(tokens, heads, b, dtype=self.dtype)
        self.pool.call(
            "batch_matmul",
            x.data_ptr(),
            self._code,
            x.stride(0),
            x.stride(1),
            tokens,
            heads,
            a,
            b,
            weight.data_ptr(),
            DTYPES[weight.dtype],
            *weight.stride(),
            out.data_ptr(),
        )
        return out

    # ---- routing ---------------------------------------------------------------------------------------------------

    def moe_gating_top_k(self, logits: Tensor, bias: Tensor | None, gating: Gating) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        tokens, experts = logits.shape
        weights, ids = torch.empty(tokens, gating.k), torch.empty(tokens, gating.k, dtype=torch.int32)
        self.pool.call(
            "gating_top_k",
            logits.data_ptr(),
            None if bias is None else bias.data_ptr(),
            tokens,
            experts,
            *_rule(gating),
            weights.data_ptr(),
            ids.data_ptr(),
        )
        return weights, ids

    def moe_init_routing(
        self, x: Tensor, expert_ids: Tensor, num_experts: int, quantize: bool
    ) -> tuple[Activation, Tensor, Tensor]:
        x, expert_ids = x.contiguous(), expert_ids.contiguous()
        (tokens, k), cols = expert_ids.shape, x.shape[1]
        row_index = torch.empty(tokens * k, dtype=torch.int32)
        group_list = torch.empty(num_experts, dtype=torch.int64)
        codes = torch.empty(tokens * k, cols, dtype=torch.int8 if quantize else self.dtype)
        scale = torch.empty(tokens * k) if quantize else None
        self.pool.call(
            "init_routing",
            x.data_ptr(),
            self._code,
            cols,
            expert_ids.data_ptr(),
            tokens,
            k,
            num_experts,
            row_index.data_ptr(),
            group_list.data_ptr(),
            None if quantize else codes.data_ptr(),
            codes.data_ptr() if quantize else None,
            None if scale is None else scale.data_ptr(),
        )
        return codes if scale is None else Quantized(codes, scale), row_index, group_list

    def moe_finalize_routing(
        self, rows: Tensor, weights: Tensor, row_index: Tensor, expert_ids: Tensor, skip: Tensor | None
    ) -> Tensor:
        rows, weights, row_index = rows.contiguous(), weights.contiguous(), row_index.contiguous()
        skip = None if skip is None else skip.contiguous()
        (tokens, k), cols = weights.shape, rows.shape[1]
        out = torch.empty(tokens, cols, dtype=self.dtype)
        self.pool.call(
            "finalize_routing",
            rows.data_ptr(),
            self._code,
            cols,
            weights.data_ptr(),
            row_index.data_ptr(),
            tokens,
            k,
            None if skip is None else skip.data_ptr(),
            out.data_ptr(),
        )
        return out

    # ---- attention -------------------------------------------------------------------------------------------------

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        out = torch.empty(tokens, heads, dim, dtype=self.dtype)
        self.pool.call(
            "interleave_rope",
            x.data_ptr(),
            self._code,
            x.stride(0),
            x.stride(1),
            tokens,
            heads,
            dim,
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
        )
        return out

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
        kv, cos, sin, slots = _rows(kv), cos.contiguous(), sin.contiguous(), slots.contiguous()
        gamma = gamma.to(self.dtype).contiguous()
        tokens, latent_dim, rope_dim = kv.shape[0], gamma.shape[0], cos.shape[-1]
        rope = torch.empty(tokens, rope_dim, dtype=self.dtype) if output_kv else None
        latent = torch.empty(tokens, latent_dim, dtype=self.dtype) if output_kv else None
        self.pool.call(
            "kv_cache_write",
            ctypes.byref(native_cache(cache)),
            kv.data_ptr(),
            kv.stride(0),
            gamma.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            tokens,
            eps,
            None if rope is None else rope.data_ptr(),
            None if latent is None else latent.data_ptr(),
        )
        return None if rope is None or latent is None else (rope, latent)

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
        tensors = [_rows(each) for each in (q_nope, q_rope, k_nope, k_rope[:, None], value)]
        heads = native_heads(*tensors)
        sequences, tokens, count = len(q_lens), q_nope.shape[0], q_nope.shape[1]
        lengths = ctypes.c_int64 * sequences
        out, lse = torch.empty(tokens, count, value.shape[2], dtype=self.dtype), torch.empty(tokens, count, 1)
        self.pool.call(
            "attention",
            ctypes.byref(heads),
            lengths(*q_lens),
            lengths(*kv_lens),
            sequences,
            scale,
            causal,
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        q_latent, q_rope, table = q_latent.contiguous(), q_rope.contiguous(), decode.block_table
        sequences = len(decode.q_lens)
        lengths = ctypes.c_int64 * sequences
        out = torch.empty_like(q_latent)
        self.pool.call(
            "attention_paged",
            ctypes.byref(native_cache(cache)),
            q_latent.data_ptr(),
            q_rope.data_ptr(),
            q_latent.shape[1],
            lengths(*decode.q_lens),
            lengths(*decode.kv_lens),
            sequences,
            table.data_ptr(),
            table.stride(0),
            scale,
            out.data_ptr(),
        )
        return out

    # ---- composites: several operators a call, of the same results -------------------------------------------------

    def mla(self, parts: MlaParts, config: MlaConfig) -> Mla:
        return native_mla(super().mla(parts, config))

    def mla_prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized):
            return super().mla_prolog(hidden, mla, cache, step)
        hidden, cos, sin, slots = (each.contiguous() for each in (hidden, step.cos, step.sin, step.slots))
        tokens, config = hidden.shape[0], mla.config
        q_latent = torch.empty(tokens, config.num_heads, config.kv_lora_rank, dtype=self.dtype)
        q_rope = torch.empty(tokens, config.num_heads, config.qk_rope_head_dim, dtype=self.dtype)
        self.pool.call(
            "mla_prolog",
            ctypes.byref(mla.block),
            ctypes.byref(native_cache(cache)),
            hidden.data_ptr(),
            self._code,
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            q_latent.data_ptr(),
            q_rope.data_ptr(),
        )
        return q_latent, q_rope

    def mla_decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step, scale: float) -> Tensor:
        decode = step.decode
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized) or decode is None:
            return super().mla_decode(hidden, mla, cache, step, scale)
        hidden, cos, sin, slots = (each.contiguous() for each in (hidden, step.cos, step.sin, step.slots))
        sequences = len(decode.q_lens)
        lengths = ctypes.c_int64 * sequences
        out = torch.empty(hidden.shape[0], mla.o.weights.outputs, dtype=self.dtype)
        self.pool.call(
            "mla_decode",
            ctypes.byref(mla.block),
            ctypes.byref(native_cache(cache)),
            hidden.data_ptr(),
            self._code,
            hidden.shape[0],
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            lengths(*decode.q_lens),
            lengths(*decode.kv_lens),
            sequences,
            decode.block_table.data_ptr(),
            decode.block_table.stride(0),
            scale,
            out.data_ptr(),
        )
        return out

    def moe(self, hidden: Tensor, weights: MoeWeights, shared: MlpWeights | None) -> Tensor:
        key = id(weights), id(shared)
        if key not in self._moe_blocks:
            self._moe_blocks[key] = native_moe(weights, shared), weights, shared
        block = self._moe_blocks[key][0]
        if block is None:
            return super().moe(hidden, weights, shared)
        hidden = hidden.contiguous()
        out = torch.empty(hidden.shape[0], weights.down.weights.outputs, dtype=self.dtype)
        self.pool.call("moe_layer", ctypes.byref(block), hidden.data_ptr(), self._code, hidden.shape[0], out.data_ptr())
        return out

    def mlp(self, hidden: Tensor, weights: MlpWeights) -> Tensor:
        gate_up, down = weights.gate_up, weights.down
        if not isinstance(gate_up, NativeLinear) or not isinstance(down, NativeLinear):
            return super().mlp(hidden, weights)
        hidden = hidden.contiguous()
        out = torch.empty(hidden.shape[0], down.weights.outputs, dtype=self.dtype)
        self.pool.call(
            "mlp",
            gate_up.address,
            down.address,
            hidden.data_ptr(),
            self._code,
            hidden.shape[0],
            out.data_ptr(),
        )
        return out

    def moe_gate(self, hidden: Tensor, weights: MoeWeights) -> tuple[Tensor, Tensor]:
        hidden, gating, bias, tokens = hidden.contiguous(), weights.gating, weights.correction_bias, hidden.shape[0]
        top_weights, ids = torch.empty(tokens, gating.k), torch.empty(tokens, gating.k, dtype=torch.int32)
        self.pool.call(
            "moe_gate",
            weights.router.address,
            None if bias is None else bias.data_ptr(),
            hidden.data_ptr(),
            self._code,
            tokens,
            *_rule(gating),
            top_weights.data_ptr(),
            ids.data_ptr(),
        )
        return top_weights, ids

    def moe_experts(
        self, hidden: Tensor, top_weights: Tensor, expert_ids: Tensor, weights: MoeWeights, shared: Tensor | None
    ) -> Tensor:
        hidden, top_weights, expert_ids = hidden.contiguous(), top_weights.contiguous(), expert_ids.contiguous()
        shared = None if shared is None else shared.contiguous()
        tokens, k = expert_ids.shape
        out = torch.empty(tokens, weights.down.weights.outputs, dtype=self.dtype)
        self.pool.call(
            "moe_experts",
            weights.gate_up.address,
            weights.down.address,
            hidden.data_ptr(),
            self._code,
            top_weights.data_ptr(),
            expert_ids.data_ptr(),
            tokens,
            k,
            None if shared is None else shared.data_ptr(),
            out.data_ptr(),
        )
        return out


def _rule(gating: Gating) -> tuple[int | float, ...]:
    """A router's rule in the order of the kernels' arguments."""
    return (
        gating.k,
        gating.scoring == "sigmoid",
        gating.group_count,
        gating.k_group,
        gating.group_select_mode,
        gating.renormalize,
        gating.scaling,
    )


def _rows(x: Tensor) -> Tensor:
    """Rows that may lie apart, each of them contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_width(x: Tensor, handle: NativeLinear) -> None:
    if x.shape[1] != handle.weights.cols:
        raise BackendError(f"{handle.name}: rows of {x.shape[1]} channels for a weight of {handle.weights.cols}")
