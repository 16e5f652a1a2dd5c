"""Norms, activation functions and quantization on native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ....native.binding import DTYPES
from ....native.pointers import address, output, rows_address
from ....parallel.torch_threads import single_threaded_torch
from ..handles import Quantized
from ..norms import Norms
from .kernels import Kernels, contiguous_rows, gain


class NativeNorms(Norms):
    """Operators on rows; those without a kernel are left to `torch`.

    Raises ValueError for tensors that do not have the dtypes and sizes of their call.
    """

    def __init__(self, kernels: Kernels, torch: Norms):
        self._call, self.dtype, self._code = kernels.pool.call, kernels.dtype, kernels.dtype_code
        self.torch = torch

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        with single_threaded_torch():
            return self.torch.embedding(token_ids, table)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        x, gamma = contiguous_rows(x), gain(gamma, self.dtype)
        rows, cols = x.shape
        out, to = output(self.dtype, rows, cols)
        self._call(
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

    def layer_norm(self, x: Tensor, gamma: Tensor, bias: Tensor, eps: float) -> Tensor:
        with single_threaded_torch():
            return self.torch.layer_norm(x, gamma, bias, eps)

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, residual, gamma = x.contiguous(), residual.contiguous(), gain(gamma, self.dtype)
        rows, cols = x.shape
        (out, to), (total, total_to) = output(self.dtype, rows, cols), output(self.dtype, rows, cols)
        self._call(
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

    def swiglu(self, x: Tensor) -> Tensor:
        return self._swiglu(x, self.dtype)

    def swiglu_float32(self, x: Tensor) -> Tensor:
        return self._swiglu(x, torch.float32)

    def _swiglu(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        rows, half = x.shape[0], x.shape[1] // 2
        out, to = output(dtype, rows, half)
        self._call(
            "swiglu",
            address(x, "swiglu", "x", self.dtype, rows, 2 * half),
            self._code,
            rows,
            half,
            to,
            DTYPES[dtype],
        )
        return out

    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        if smooth is not None:
            return self.torch.dynamic_quant(x, smooth)
        x = contiguous_rows(x)
        rows, cols = x.shape
        (codes, codes_to), (scale, scale_to) = output(torch.int8, rows, cols), output(torch.float32, rows)
        start = rows_address(x, "dynamic_quant", "x", self.dtype, rows, cols)
        self._call("dynamic_quant", start, self._code, x.stride(0), rows, cols, codes_to, scale_to)
        return Quantized(codes, scale)

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        x = x.contiguous()
        rows, half = x.shape[0], x.shape[1] // 2
        (codes, codes_to), (scale, scale_to) = output(torch.int8, rows, half), output(torch.float32, rows)
        start = address(x, "swiglu_quant", "x", self.dtype, rows, 2 * half)
        self._call("swiglu_quant", start, self._code, rows, half, codes_to, scale_to)
        return Quantized(codes, scale)

    def row_maximum(self, x: Tensor) -> Tensor:
        x = contiguous_rows(x)
        rows, cols = x.shape
        largest, to = output(torch.float32, rows)
        start = rows_address(x, "row_maximum", "x", x.dtype, rows, cols)
        self._call("row_maximum", start, _code(x), x.stride(0), rows, cols, to)
        return largest

    def dynamic_quant_by(self, x: Tensor, largest: Tensor) -> Quantized:
        return self._quant_parts(x, largest, divide=False)

    def swiglu_quant_by(self, activated: Tensor, largest: Tensor) -> Quantized:
        return self._quant_parts(activated, largest, divide=True)

    def _quant_parts(self, x: Tensor, largest: Tensor, divide: bool) -> Quantized:
        x, largest = contiguous_rows(x), largest.contiguous()
        rows, cols = x.shape
        (codes, codes_to), (scale, scale_to) = output(torch.int8, rows, cols), output(torch.float32, rows)
        self._call(
            "quant_parts",
            rows_address(x, "quant_parts", "x", x.dtype, rows, cols),
            _code(x),
            x.stride(0),
            rows,
            cols,
            address(largest, "quant_parts", "largest", torch.float32, rows),
            divide,
            codes_to,
            scale_to,
        )
        return Quantized(codes, scale)


def _code(x: Tensor) -> int:
    """The library's number of the dtype of rows that may be float32 whatever the compute dtype is."""
    if x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"rows of {x.dtype}; the native kernels take float32 and bfloat16")
    return DTYPES[x.dtype]
