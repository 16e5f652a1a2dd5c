"""Rotary embedding on native kernels."""

from __future__ import annotations

from torch import Tensor

from ....native.pointers import address, output, rows_address
from ..rotary import Rotary
from .kernels import Kernels


class NativeRotary(Rotary):
    """Rotations in C. Raises ValueError for tensors that do not have the dtypes and sizes of their call."""

    def __init__(self, kernels: Kernels):
        self.dtype, self._call, self._code = kernels.dtype, kernels.pool.call, kernels.dtype_code

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        out, to = output(self.dtype, tokens, heads, dim)
        self._call(
            "interleave_rope",
            rows_address(x, "interleave_rope", "x", self.dtype, tokens, heads, dim),
            self._code,
            x.stride(0),
            x.stride(1),
            tokens,
            heads,
            dim,
            address(cos, "interleave_rope", "cos", self.dtype, tokens, dim),
            address(sin, "interleave_rope", "sin", self.dtype, tokens, dim),
            to,
        )
        return out
