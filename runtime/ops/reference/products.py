"""Products in plain torch, written to be short: every use unpacks and upcasts the weights."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ....errors import BackendError
from ....formats.int4 import unpack_int4
from ....formats.schemes import Scheme
from ....native.pointers import begins_a_cache_line
from ..handles import Activation, Experts, Linear, LinearPart, Quantized, Router, Static, own
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
            return torch.cat([self._float_matmul(x, part) for part in handle.parts], dim=-1)
        return self.scale_sums(self.integer_sums(self.static_quant(x, handle), handle), None, handle)

    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        return x.float() @ own(router, StoredRouter).weight.float().T

    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[1] == 1:  # see ReferenceLatentAttention._attention
            return self.batch_matmul(x.expand(-1, 2, -1), weight.expand(2, -1, -1))[:, :1]
        product = x.transpose(0, 1).float() @ weight.float()
        return product.transpose(0, 1).to(self.dtype)

    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        linears = own(experts, PartsExperts).linears
        groups = zip(rows_of_experts(x, group_list), linears, strict=True)
        return torch.cat([self.linear(rows, linear) for rows, linear in groups])

    def static_quant(self, x: Tensor, linear: Linear) -> Tensor:
        inputs = _static(own(linear, PartsLinear).parts[0]).inputs
        # The device takes the scale's inverse in the dtype of x.
        factor = (1.0 / torch.tensor(inputs.scale).to(self.dtype)).float()
        return (x.float() * factor + inputs.offset).round().clamp(-128, 127).to(torch.int8)

    def integer_sums(self, codes: Tensor, linear: Linear) -> Tensor:
        parts = own(linear, PartsLinear).parts
        return torch.cat([self._integers(codes, part).to(torch.int32) for part in parts], dim=-1)

    def scale_sums(self, sums: Tensor, scale: Tensor | None, linear: Linear) -> Tensor:
        parts = own(linear, PartsLinear).parts
        of_parts = sums.split([part.weight.shape[0] for part in parts], dim=-1)
        return torch.cat(
            [
                self._scale_static(some, part) if scale is None else self._scale(some, scale, part)
                for some, part in zip(of_parts, parts, strict=True)
            ],
            dim=-1,
        )

    def _float_matmul(self, x: Tensor, part: LinearPart) -> Tensor:
        x = aligned(x.float())
        if part.output_division is None:
            return F.linear(x, aligned(part.weight.float())).to(self.dtype)
        # The last bits of torch's products depend on the number of outputs: these are computed in their place of all.
        rows = part.output_division.own
        whole = torch.zeros(part.output_division.total, part.weight.shape[1])
        whole[rows.start : rows.stop] = part.weight
        return F.linear(x, whole)[:, rows.start : rows.stop].to(self.dtype)

    def _integers(self, codes: Tensor, part: LinearPart) -> Tensor:
        """Multiply codes int8 `[T, K]` by a part's codes: whole numbers `[T, N]`, in any dtype that holds them."""
        weight = unpack_int4(part.weight) if part.scheme is Scheme.W4A8 else part.weight
        # float64 holds every sum of products of two int8 exactly.
        return codes.double() @ weight.double().T

    def _quant_matmul(self, rows: Quantized, part: LinearPart) -> Tensor:
        return self._scale(self._integers(rows.codes, part), rows.scale, part)

    def _scale(self, integers: Tensor, scale: Tensor, part: LinearPart) -> Tensor:
        assert part.scale is not None
        return (integers.float() * part.scale.T).mul_(scale[:, None]).to(self.dtype)

    def _scale_static(self, integers: Tensor, part: LinearPart) -> Tensor:
        static = _static(part)
        return (integers + static.quant_bias).float().mul_(static.deq_scale).to(self.dtype)


def _static(part: LinearPart) -> Static:
    if part.static is None:
        raise BackendError(f"{part.name}: {part.scheme.value} has no static input scale")
    return part.static


def aligned(matrix: Tensor) -> Tensor:
    """A matrix in memory that begins with a cache line, copied where it does not.

    The last bits of torch's product of a single row depend on it. A mapped weight lies anywhere, and a rank may have a
    copy of it.
    """
    return matrix if begins_a_cache_line(matrix) else matrix.clone()


def rows_of_experts(x: Activation, group_list: Tensor) -> Iterator[Activation]:
    """Split rows sorted by expert into one group an expert."""
    sizes = group_list.tolist()
    if isinstance(x, Quantized):
        yield from (Quantized(*pair) for pair in zip(x.codes.split(sizes), x.scale.split(sizes), strict=True))
    else:
        yield from x.split(sizes)
