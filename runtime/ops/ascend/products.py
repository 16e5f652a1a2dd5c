"""Products on torch_npu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ....errors import BackendError
from ..handles import Activation, Experts, Linear, Quantized, Router, own
from ..norms import Norms
from ..products import Products
from .device import ROWS_OF_EACH, Npu
from .ranks.rows import integer_sums
from .tuning.grouped_matmul import Tuning
from .weights import (
    MAX_DIMENSION,
    DeviceRouter,
    FloatExperts,
    FloatLinear,
    QuantizedExperts,
    StaticLinear,
    W4A8Experts,
    W8A8Linear,
    float_scales,
)


class AscendProducts(Products):
    """Matrix products by torch_npu."""

    def __init__(self, npu: Npu, norms: Norms, tuning: Tuning):
        self.npu, self.norms, self.tuning = npu, norms, tuning

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        if isinstance(linear, FloatLinear):
            if isinstance(x, Quantized):
                raise BackendError("a float linear was given quantized rows")
            return F.linear(x, linear.weight)
        if isinstance(linear, StaticLinear):
            return self._static_product(self._static_codes(x, linear), linear)
        handle = own(linear, W8A8Linear)
        rows = x if isinstance(x, Quantized) else self.norms.dynamic_quant(x)
        product: Tensor = self.npu.operators.npu_quant_matmul(
            rows.codes, handle.weight, handle.scale, pertoken_scale=rows.scale, output_dtype=self.npu.dtype
        )
        return product

    def linears(self, x: Activation, linears: Sequence[Linear]) -> list[Tensor]:
        if not isinstance(x, Quantized):
            static = [linear for linear in linears if isinstance(linear, StaticLinear)]
            if static and len(static) == len(linears) and len({linear.inputs for linear in static}) == 1:
                codes = self._static_codes(x, static[0])
                return [self._static_product(codes, linear) for linear in static]
            if all(isinstance(linear, W8A8Linear) for linear in linears):
                x = self.norms.dynamic_quant(x)
        return super().linears(x, linears)

    def _static_codes(self, x: Activation, handle: StaticLinear) -> Tensor:
        if isinstance(x, Quantized):
            raise BackendError("a static W8A8 linear was given quantized rows")
        codes: Tensor = self.static_quant(x, handle)
        return codes

    def _static_product(self, codes: Tensor, handle: StaticLinear) -> Tensor:
        product: Tensor = self.npu.operators.npu_quant_matmul(
            codes, handle.weight, handle.deq_scale, bias=handle.quant_bias, output_dtype=self.npu.dtype
        )
        return product

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return F.linear(x.float(), own(router, DeviceRouter).weight)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        if isinstance(experts, FloatExperts):
            if isinstance(x, Quantized):
                raise BackendError("float experts were given quantized rows")
            return self._grouped_matmul(x, experts.weight, group_list)
        handle = own(experts, QuantizedExperts)
        rows = x if isinstance(x, Quantized) else self.norms.dynamic_quant(x)
        more: dict[str, list[Any]] = {"scale": [handle.scale], "per_token_scale": [rows.scale]}
        if isinstance(handle, W4A8Experts):
            more["bias"] = [handle.scale_bias]
        tuned = self.tuning.config_for(handle, rows.codes.shape[0])
        if tuned is not None:
            more["tuning_config"] = tuned
        return self._grouped_matmul(rows.codes, handle.weight, group_list, **more)

    def _grouped_matmul(self, rows: Tensor, weight: Tensor, group_list: Tensor, **more: list[Any]) -> Tensor:
        product: Tensor = self.npu.operators.npu_grouped_matmul(
            [rows],
            [weight],
            group_list=group_list,
            group_list_type=ROWS_OF_EACH,
            group_type=0,
            split_item=2,
            output_dtype=self.npu.dtype,
            **more,
        )[0]
        return product

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        # The output of dense decode attention is head-major: then x needs no transposition in the kernel, which limits
        # heads · K to 65535. 128 heads of 512 exceed it: they are copied where attention was sparse.
        by_head = x.transpose(0, 1)
        if x.shape[1] * x.shape[2] > MAX_DIMENSION:
            by_head = by_head.contiguous()
        stored, order = (by_head, (0, 1, 2)) if by_head.is_contiguous() else (x, (1, 0, 2))
        product: Tensor = self.npu.operators.npu_transpose_batchmatmul(stored, weight, perm_x1=order, perm_y=(1, 0, 2))
        return product

    def static_quant(self, x: Tensor, linear: Linear) -> Tensor:
        handle = own(linear, StaticLinear)
        # div_mode False multiplies: the engines' choice, and the one that takes float16 too.
        codes: Tensor = self.npu.operators.npu_quantize(x, handle.factor, handle.offset, torch.qint8, -1, False)
        return codes

    def integer_sums(self, codes: Tensor, linear: Linear) -> Tensor:
        handle = linear if isinstance(linear, StaticLinear) else own(linear, W8A8Linear)
        return integer_sums(codes, handle.weight, self.npu)

    def scale_sums(self, sums: Tensor, scale: Tensor | None, linear: Linear) -> Tensor:
        if scale is None:
            static = own(linear, StaticLinear)
            return ((sums + static.quant_bias).float() * float_scales(static.deq_scale)).to(self.npu.dtype)
        return (sums.float() * own(linear, W8A8Linear).scale * scale.unsqueeze(1)).to(self.npu.dtype)
