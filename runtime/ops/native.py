"""The CPU's operators on native kernels: memory-mapped weights are used as they are stored, by one pool of threads.

Integers equal the reference's; floats differ in the last bits (order of additions, exp). Operators that no step spends
time in stay torch's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...errors import BackendError
from ...quant.native import DTYPES, INT4, Cache, Part, Pool, Weights
from ...quant.schemes import Scheme
from . import Activation, Decode, Experts, Gating, LayerCache, Linear, LinearPart, Quantized, Router
from .cpu import CpuOps
from .reference import PartsLinear

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NativeLinear:
    """Stored weights by address: `weights` for the kernels, `owners` to keep the memory behind it."""

    weights: Weights
    quantized: bool
    name: str
    owners: tuple[object, ...] = field(repr=False)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.weights)


class NativeOps(CpuOps):
    """CpuOps with its inner loops in C. dtype is float32 or bfloat16."""

    def __init__(self, dtype: torch.dtype = torch.float32, threads: int | None = None, level: str | None = None):
        super().__init__(dtype)
        if dtype not in (torch.float32, torch.bfloat16):
            raise BackendError(f"the native kernels compute in float32 or bfloat16, not {dtype}")
        self.pool = Pool(threads, level)
        self._code = DTYPES[dtype]

    # ---- at load ---------------------------------------------------------------------------------------------------

    def float_linear(self, weights: Sequence[Tensor]) -> Linear:
        return _linear([[LinearPart("", Scheme.FLOAT, weight) for weight in weights]])

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return _linear([parts])

    def static_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return PartsLinear(tuple(parts))

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return _linear(experts)

    w8a8_experts = float_experts
    w4a8_experts = float_experts

    def router(self, weight: Tensor) -> Router:
        return _linear([[LinearPart("router", Scheme.FLOAT, weight)]])

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

    def dynamic_quant(self, x: Tensor) -> Quantized:
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
        return self._matmul(x, linear, None, self.dtype)

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return self._matmul(x, router, None, torch.float32)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        return self._matmul(x, experts, group_list, self.dtype)

    def _matmul(self, x: Activation, handle: NativeLinear, group_list: Tensor | None, dtype: torch.dtype) -> Tensor:
        rows, scale = self._operand(x, handle)
        weights = handle.weights
        if rows.shape[1] != weights.cols:
            raise BackendError(f"{handle.name}: rows of {rows.shape[1]} channels for a weight of {weights.cols}")
        out = torch.empty(rows.shape[0], weights.outputs, dtype=dtype)
        self.pool.call(
            "matmul",
            handle.address,
            rows.data_ptr(),
            DTYPES[rows.dtype],
            None if scale is None else scale.data_ptr(),
            None if group_list is None else group_list.data_ptr(),
            rows.shape[0],
            out.data_ptr(),
            DTYPES[dtype],
        )
        return out

    def _operand(self, x: Activation, handle: NativeLinear) -> tuple[Tensor, Tensor | None]:
        if handle.quantized:
            quantized = x if isinstance(x, Quantized) else self.dynamic_quant(x)
            return quantized.codes.contiguous(), quantized.scale.contiguous()
        if isinstance(x, Quantized):
            raise BackendError(f"{handle.name}: a float linear was given quantized rows")
        return x.contiguous(), None

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
            gating.k,
            gating.scoring == "sigmoid",
            gating.group_count,
            gating.k_group,
            gating.group_select_mode,
            gating.renormalize,
            gating.scaling,
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
            ctypes.byref(_cache(cache)),
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

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        q_latent, q_rope, table = q_latent.contiguous(), q_rope.contiguous(), decode.block_table
        sequences = len(decode.q_lens)
        lengths = ctypes.c_int64 * sequences
        out = torch.empty_like(q_latent)
        self.pool.call(
            "attention_paged",
            ctypes.byref(_cache(cache)),
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


def _rows(x: Tensor) -> Tensor:
    """Rows that may lie apart, each of them contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _cache(cache: LayerCache) -> Cache:
    channels = cache.latent.shape[1] * cache.latent.shape[3], cache.rope.shape[1] * cache.rope.shape[3]
    return Cache(
        cache.latent.data_ptr(), cache.rope.data_ptr(), cache.block_size, *channels, DTYPES[cache.latent.dtype]
    )


def _linear(groups: Sequence[Sequence[LinearPart]]) -> NativeLinear:
    """Groups of parts, the same count in each, fused along their outputs.

    Raises BackendError where their shapes, dtypes or schemes do not allow it.
    """
    first = groups[0][0]
    owners: list[Tensor] = []
    parts = (Part * (len(groups) * len(groups[0])))()
    outputs = _outputs(groups[0])
    for index, part in enumerate(part for group in groups for part in group):
        if (part.scheme, part.weight.dtype, part.weight.shape[1]) != (
            first.scheme,
            first.weight.dtype,
            first.weight.shape[1],
        ):
            raise BackendError(f"{part.name}: linears that run as one must be alike, {first.name} is not")
        weight = part.weight.contiguous()
        scale = None if part.scale is None else part.scale.contiguous()
        if scale is not None and (scale.numel() != _height(part) or scale.dtype != torch.float32):
            raise BackendError(
                f"{part.name}: scale {list(scale.shape)} {scale.dtype}, not float32 [{_height(part)}, 1]"
            )
        parts[index] = Part(weight.data_ptr(), None if scale is None else scale.data_ptr(), _height(part))
        owners += [weight] if scale is None else [weight, scale]
    for group in groups:
        if len(group) != len(groups[0]) or _outputs(group) != outputs:
            raise BackendError(f"{group[0].name}: the experts of a layer must have one shape")
    weights = Weights(parts, len(groups), len(groups[0]), first.weight.shape[1], outputs, _dtype_code(first))
    return NativeLinear(weights, first.scheme is not Scheme.FLOAT, first.name, (parts, *owners))


def _height(part: LinearPart) -> int:
    return part.weight.shape[0] * (2 if part.scheme is Scheme.W4A8 else 1)


def _outputs(group: Sequence[LinearPart]) -> int:
    return sum(_height(part) for part in group)


def _dtype_code(part: LinearPart) -> int:
    if part.scheme is Scheme.W4A8:
        return INT4
    wanted = _FLOATS if part.scheme is Scheme.FLOAT else (torch.int8,)
    if part.weight.dtype not in wanted:
        raise BackendError(f"{part.name}: {part.scheme.value} weight of dtype {part.weight.dtype}")
    return DTYPES[part.weight.dtype]
