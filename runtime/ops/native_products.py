"""Native kernels' side of the CPU's operators, first part: weights by address, norms, quantization and products."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...errors import BackendError
from ...quant.native import DTYPES, Pool
from ...quant.schemes import Scheme
from ...torch_threads import single_threaded_torch
from . import Activation, Experts, Linear, LinearPart, Quantized, Router
from .cpu import CpuOps
from .native_weights import NativeLinear, native_linear
from .reference import PartsLinear


class NativeProducts(CpuOps):
    """What the other parts build on. `pool` runs the kernels; `_code` is the compute dtype's number there."""

    def __init__(self, dtype: torch.dtype, threads: int | None, level: str | None):
        super().__init__(dtype)
        if dtype not in (torch.float32, torch.bfloat16):
            raise BackendError(f"the native kernels compute in float32 or bfloat16, not {dtype}")
        self.pool = Pool(threads, level)
        self._code = DTYPES[dtype]

    def one_thread(self) -> AbstractContextManager[None]:
        return single_threaded_torch()

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

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        with self.one_thread():
            return super().embedding(token_ids, table)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        x = contiguous_rows(x)
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
        x = contiguous_rows(x)
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
        x, weights = contiguous_rows(x) if handle.quantized else x.contiguous(), handle.weights
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


def contiguous_rows(x: Tensor) -> Tensor:
    """Rows that may lie apart, each of them contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _check_width(x: Tensor, handle: NativeLinear) -> None:
    if x.shape[1] != handle.weights.cols:
        raise BackendError(f"{handle.name}: rows of {x.shape[1]} channels for a weight of {handle.weights.cols}")
