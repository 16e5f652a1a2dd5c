"""Native kernels' side of the CPU's operators, first part: weights by address, norms, quantization and products."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ...errors import BackendError
from ...formats.schemes import Scheme
from ...native.binding import DTYPES, Pool
from ...native.pointers import address, output, rows_address
from ...parallel.torch_threads import single_threaded_torch
from . import Activation, Experts, Linear, LinearPart, Quantized, Router
from .cpu import CpuOps
from .native_weights import NativeLinear, matrices_address, native_linear
from .reference import PartsLinear


class NativeProducts(CpuOps):
    """What the other parts build on. `pool` runs the kernels; `_code` is the compute dtype's number there.

    Every operator raises ValueError for tensors that do not have the dtypes and sizes of its call.
    """

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
        return native_linear([[LinearPart("a float weight", Scheme.FLOAT, weight) for weight in weights]])

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
        x, gamma = contiguous_rows(x), self._gain(gamma)
        rows, cols = x.shape
        out, to = output(self.dtype, rows, cols)
        self.pool.call(
            "rms_norm",
            rows_address(x, "rms_norm", "x", self.dtype, rows, cols),
            self._code,
            x.stride(0),
            address(gamma, "rms_norm", "gamma", self.dtype, cols),
            rows,
            cols,
            eps,
            to,
        )
        return out

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual, gamma = x.contiguous(), residual.contiguous(), self._gain(gamma)
        rows, cols = x.shape
        (out, to), (total, total_to) = output(self.dtype, rows, cols), output(self.dtype, rows, cols)
        self.pool.call(
            "add_rms_norm",
            address(x, "add_rms_norm", "x", self.dtype, rows, cols),
            address(residual, "add_rms_norm", "residual", self.dtype, rows, cols),
            self._code,
            address(gamma, "add_rms_norm", "gamma", self.dtype, cols),
            rows,
            cols,
            eps,
            to,
            total_to,
        )
        return out, total

    def _gain(self, gamma: Tensor) -> Tensor:
        # `to` takes a microsecond for what it leaves as it is.
        return (gamma if gamma.dtype is self.dtype else gamma.to(self.dtype)).contiguous()

    def swiglu(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows, half = x.shape[0], x.shape[1] // 2
        out, to = output(self.dtype, rows, half)
        self.pool.call("swiglu", address(x, "swiglu", "x", self.dtype, rows, 2 * half), self._code, rows, half, to)
        return out

    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        if smooth is not None:
            return super().dynamic_quant(x, smooth)
        x = contiguous_rows(x)
        rows, cols = x.shape
        (codes, codes_to), (scale, scale_to) = output(torch.int8, rows, cols), output(torch.float32, rows)
        start = rows_address(x, "dynamic_quant", "x", self.dtype, rows, cols)
        self.pool.call("dynamic_quant", start, self._code, x.stride(0), rows, cols, codes_to, scale_to)
        return Quantized(codes, scale)

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        x = x.contiguous()
        rows, half = x.shape[0], x.shape[1] // 2
        (codes, codes_to), (scale, scale_to) = output(torch.int8, rows, half), output(torch.float32, rows)
        start = address(x, "swiglu_quant", "x", self.dtype, rows, 2 * half)
        self.pool.call("swiglu_quant", start, self._code, rows, half, codes_to, scale_to)
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
        x, weights, rows = contiguous_rows(x) if handle.quantized else x.contiguous(), handle.weights, x.shape[0]
        look = rows_address if handle.quantized else address
        out, to = output(dtype, rows, weights.outputs)
        self.pool.call(
            "linear",
            handle.address,
            look(x, "linear", f"x of {handle.name}", self.dtype, rows, weights.cols),
            self._code,
            x.stride(0),
            rows,
            to,
            DTYPES[dtype],
        )
        return out

    def _matmul(self, x: Activation, handle: NativeLinear, group_list: Tensor | None) -> Tensor:
        if isinstance(x, Quantized) and not handle.quantized:
            raise BackendError(f"{handle.name}: a float linear was given quantized rows")
        weights, of = handle.weights, f"of {handle.name}"
        scale: int | None = None
        if isinstance(x, Quantized):
            rows, x_scale, dtype = x.codes.contiguous(), x.scale.contiguous(), torch.int8
            scale = address(x_scale, "matmul", f"x_scale {of}", torch.float32, rows.shape[0])
        else:
            rows, dtype = x.contiguous(), self.dtype
        counts: int | None = None
        if group_list is not None:
            group_list = group_list.contiguous()
            counts = address(group_list, "matmul", f"group_list {of}", torch.int64, weights.groups)
        count = rows.shape[0]
        out, to = output(self.dtype, count, weights.outputs)
        start = address(rows, "matmul", f"x {of}", dtype, count, weights.cols)
        self.pool.call("matmul", handle.address, start, DTYPES[dtype], scale, counts, count, to, self._code)
        return out

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens, heads, a = x.shape
        b = weight.shape[2]
        if 1 not in weight.stride()[1:] or x.stride(2) != 1:
            return super().batch_matmul(x, weight)
        out, to = output(self.dtype, tokens, heads, b)
        self.pool.call(
            "batch_matmul",
            rows_address(x, "batch_matmul", "x", self.dtype, tokens, heads, a),
            self._code,
            x.stride(0),
            x.stride(1),
            tokens,
            heads,
            a,
            b,
            matrices_address(weight, "batch_matmul", "weight", heads, a, b),
            DTYPES[weight.dtype],
            *weight.stride(),
            to,
        )
        return out


def contiguous_rows(x: Tensor) -> Tensor:
    """Rows that may lie apart, each of them contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
