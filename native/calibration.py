"""Calibration's arithmetic by the native kernels, on the calling thread (`quant.arithmetic.Arithmetic`).

Results do not depend on the instruction level: every number is one chain of fused multiply-adds.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64

import torch
from torch import Tensor

from ..quant.arithmetic import LANES, Arithmetic, TorchArithmetic
from .library import call, description, level_index, library
from .pointers import address, rows_address, strided_address
from .quantization import failure

__all__ = ["LANES", "NativeArithmetic", "calibration_arithmetic"]


def calibration_arithmetic() -> Arithmetic:
    """The fastest arithmetic of this machine's processors."""
    return TorchArithmetic() if library() is None else NativeArithmetic()


class NativeArithmetic:
    """The operators of `quant.arithmetic.Arithmetic` on CPU tensors.

    level: an instruction-set level by name; None for the best. Raises RuntimeError without the native library, and for
    a level that this CPU lacks.
    """

    device = torch.device("cpu")

    def __init__(self, level: str | None = None):
        found = library()
        if found is None:
            raise RuntimeError(description())
        self._library = found
        self._level = -1 if level is None else level_index(found, level)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None, *, subtract: bool = False) -> Tensor:
        """a `[M, K]` · b `[K, N]`, of any strides, in `out` `[M, N]` where it is given; `subtract`: out − a · b."""
        (m, k), n = a.shape, b.shape[-1]
        if out is None:
            out = torch.empty(m, n)
        self._call(
            "float_product",
            strided_address(a, "float_product", "a", torch.float32, m, k),
            *a.stride(),
            strided_address(b, "float_product", "b", torch.float32, k, n),
            *b.stride(),
            m,
            n,
            k,
            subtract,
            subtract,
            rows_address(out, "float_product", "out", torch.float32, m, n),
            _row_stride(out),
        )
        return out

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x `[T, K]` · weight `[N, K]`ᵀ."""
        return self.product(x, weight.T)

    def gptq_columns(
        self, lower: Tensor, bits: int, scale: Tensor, weight: Tensor, sums: Tensor, errors: Tensor, codes: Tensor
    ) -> None:
        """Round a panel of columns; weight, sums, errors and codes [B, R] are transposed, R a multiple of LANES."""
        name, (columns, rows) = "gptq_columns", weight.shape
        self._call(
            name,
            rows_address(lower, name, "lower", torch.float32, columns, columns),
            _row_stride(lower),
            columns,
            rows,
            bits,
            address(scale, name, "scale", torch.float32, rows),
            address(weight, name, "weight", torch.float32, columns, rows),
            address(sums, name, "sums", torch.float32, columns, rows),
            address(errors, name, "errors", torch.float32, columns, rows),
            address(codes, name, "codes", torch.int8, columns, rows),
        )

    def descend(
        self, hessian: Tensor, inverse_diagonal: Tensor, bits: int, scale: Tensor, gradient: Tensor, codes: Tensor
    ) -> int:
        """One sweep of coordinate descent over codes int8 [R, K]; returns the number of changed codes."""
        name, (rows, columns) = "descend", codes.shape
        moves = c_int64()
        self._call(
            name,
            address(hessian, name, "hessian", torch.float32, columns, columns),
            address(inverse_diagonal, name, "inverse_diagonal", torch.float32, columns),
            columns,
            rows,
            bits,
            address(scale, name, "scale", torch.float32, rows),
            address(gradient, name, "gradient", torch.float32, rows, columns),
            address(codes, name, "codes", torch.int8, rows, columns),
            ctypes.byref(moves),
        )
        return moves.value

    def _call(self, name: str, *arguments: object) -> None:
        status = call(self._library, name, self._level, *arguments)
        if status:
            raise failure(name, status)


def _row_stride(x: Tensor) -> int:
    """The stride between rows of x [N, K]; K where there are not two rows, of which any stride is given."""
    return x.stride(0) if x.shape[0] > 1 else x.shape[1]
