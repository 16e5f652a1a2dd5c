"""Rotary embedding on native kernels."""

from __future__ import annotations

from torch import Tensor

from ....native.pointers import address, output, rows_address
from ....parallel.torch_threads import single_threaded_torch
from ..rotary import Rotary
from .kernels import Kernels


class NativeRotary(Rotary):
    """Rotations of interleaved pairs in C, and those of halves by `torch`.

    Raises ValueError for tensors that do not have the dtypes and sizes of their call.
    """

    def __init__(self, kernels: Kernels, torch: Rotary):
        self.dtype, self._call, self._code = kernels.dtype, kernels.pool.call, kernels.dtype_code
        self.torch = torch

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

    def rotary_mul(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        with single_threaded_torch():
            return self.torch.rotary_mul(x, cos, sin)
