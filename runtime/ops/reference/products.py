"""Products in plain torch, written to be short: every use unpacks and upcasts the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ....errors import BackendError
from ....formats.int4 import unpack_int4
from ....formats.schemes import Scheme
from ....formats.static_w8a8 import InputScale
from ..handles import Activation, Experts, Linear, LinearPart, Quantized, Router, own
from ..norms import Norms
from ..products import Products
from .weights import PartsExperts, PartsLinear, StoredRouter


class ReferenceProducts(Products):
    """Products on the CPU. dtype: the compute dtype."""

    def __init__(self, dtype: torch.dtype, norms: Norms):
        self.dtype, self.norms = dtype, norms

    def linear(self, x: Activation, linear: Linear) -> Tensor:
        handle = own(linear, PartsLinear)
        if handle.scheme in (Scheme.W8A8, Scheme.W4A8):
            rows = x if isinstance(x, Quantized) else self.norms.dynamic_quant(x)
            return torch.cat([self._quant_matmul(rows, part) for part in handle.parts], dim=-1)
        if isinstance(x, Quantized):
            kind = "float" if handle.scheme is Scheme.FLOAT else "static W8A8"
            raise BackendError(f"{handle.parts[0].name}: a {kind} linear was given quantized rows")
        if handle.scheme is Scheme.FLOAT:
            return torch.cat([self._float_matmul(x, part.weight) for part in handle.parts], dim=-1)
        static = handle.parts[0].static
        assert static is not None
        codes = self.static_quant(x, static.inputs)
        return torch.cat([self.static_matmul(codes, part) for part in handle.parts], dim=-1)

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return x.float() @ own(router, StoredRouter).weight.float().T

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        product = x.transpose(0, 1).float() @ weight.float()
        return product.transpose(0, 1).to(self.dtype)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        linears = own(experts, PartsExperts).linears
        groups = zip(rows_of_experts(x, group_list), linears, strict=True)
        return torch.cat([self.linear(rows, linear) for rows, linear in groups])

    def _float_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x.float(), weight.float()).to(self.dtype)

    def _quant_matmul(self, rows: Quantized, part: LinearPart) -> Tensor:
        codes = unpack_int4(part.weight) if part.scheme is Scheme.W4A8 else part.weight
        # float64 holds every sum of products of two int8 exactly.
        accumulator = rows.codes.double() @ codes.double().T
        assert part.scale is not None
        return (accumulator.float() * part.scale.T * rows.scale[:, None]).to(self.dtype)

    def static_quant(self, x: Tensor, inputs: InputScale) -> Tensor:
        """Rows `[T, K]` as int8 codes of one scale and offset."""
        # The device takes the scale's inverse in the dtype of x.
        factor = (1.0 / torch.tensor(inputs.scale).to(self.dtype)).float()
        return (x.float() * factor + inputs.offset).round().clamp(-128, 127).to(torch.int8)

    def static_matmul(self, codes: Tensor, part: LinearPart) -> Tensor:
        """int8 codes `[T, K]` times a static linear: `[T, N]` in the compute dtype."""
        assert part.static is not None
        accumulator = codes.double() @ part.weight.double().T + part.static.quant_bias
        return (accumulator.float() * part.static.deq_scale).to(self.dtype)


def rows_of_experts(x: Activation, group_list: Tensor) -> Iterator[Activation]:
    """Split rows sorted by expert into one group an expert."""
    sizes = group_list.tolist()
    if isinstance(x, Quantized):
        yield from (Quantized(*pair) for pair in zip(x.codes.split(sizes), x.scale.split(sizes), strict=True))
    else:
        yield from x.split(sizes)
