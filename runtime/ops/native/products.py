"""Products on native kernels, which read stored weights in place."""

from __future__ import annotations

import torch
from torch import Tensor

from ....errors import BackendError
from ....native.binding import DTYPES
from ....native.pointers import address, output, rows_address
from ..handles import Activation, Experts, Linear, Quantized, Router, own
from ..norms import Norms
from ..products import Products
from .kernels import Kernels, contiguous_rows
from .weights import NativeLinear, matrices_address


class NativeProducts(Products):
    """Matrix products. Left to `torch`: static W8A8 linears, and heads with strides that no kernel takes.

    Raises ValueError for tensors that do not have the dtypes and sizes of their call.
    """

    def __init__(self, kernels: Kernels, norms: Norms, torch: Products):
        self._call, self.dtype, self._code = kernels.pool.call, kernels.dtype, kernels.dtype_code
        self.norms, self.torch = norms, torch

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        if not isinstance(linear, NativeLinear):  # of static W8A8
            return self.torch.linear(x, linear)
        if isinstance(x, Quantized):
            return self._matmul(x, linear, None)
        return self._linear(x, linear, self.dtype)

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return self._linear(x, own(router, NativeLinear), torch.float32)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        handle = own(experts, NativeLinear)
        if handle.quantized and not isinstance(x, Quantized):
            x = self.norms.dynamic_quant(x)
        return self._matmul(x, handle, group_list)

    def _linear(self, x: Tensor, handle: NativeLinear, dtype: torch.dtype) -> Tensor:
        x, weights, rows = contiguous_rows(x) if handle.quantized else x.contiguous(), handle.weights, x.shape[0]
        look = rows_address if handle.quantized else address
        out, to = output(dtype, rows, weights.outputs)
        self._call(
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
        self._call("matmul", handle.address, start, DTYPES[dtype], scale, counts, count, to, self._code)
        return out

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        tokens, heads, a = x.shape
        b = weight.shape[2]
        if 1 not in weight.stride()[1:] or x.stride(2) != 1:
            return self.torch.batch_matmul(x, weight)
        out, to = output(self.dtype, tokens, heads, b)
        self._call(
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

    def static_quant(self, x: Tensor, linear: Linear) -> Tensor:
        return self.torch.static_quant(x, linear)

    def integer_sums(self, codes: Tensor, linear: Linear) -> Tensor:
        if not isinstance(linear, NativeLinear):  # of static W8A8
            return self.torch.integer_sums(codes, linear)
        codes, rows = codes.contiguous(), codes.shape[0]
        sums, to = output(torch.int32, rows, linear.weights.outputs)
        start = address(codes, "integer_sums", f"x of {linear.name}", torch.int8, rows, linear.weights.cols)
        self._call("integer_sums", linear.address, start, rows, to)
        return sums

    def scale_sums(self, sums: Tensor, scale: Tensor | None, linear: Linear) -> Tensor:
        if not isinstance(linear, NativeLinear) or scale is None:
            return self.torch.scale_sums(sums, scale, linear)
        sums, scale, rows, of = sums.contiguous(), scale.contiguous(), sums.shape[0], f"of {linear.name}"
        out, to = output(self.dtype, rows, linear.weights.outputs)
        self._call(
            "scale_sums",
            linear.address,
            address(sums, "scale_sums", f"sums {of}", torch.int32, rows, linear.weights.outputs),
            address(scale, "scale_sums", f"scale {of}", torch.float32, rows),
            rows,
            to,
            self._code,
        )
        return out
