"""Stored weights for native calls: their addresses, and the owners of the memory behind them.

A handle is checked when it is made: its tensors have the dtypes and sizes of its struct. An operator then checks only
the arguments of its call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....errors import BackendError
from ....formats.schemes import Scheme
from ....native.binding import DTYPES, INT4, Part
from ....native.binding import Weights as WeightsStruct
from ....native.pointers import address, rows_address
from ...ranks.division import Division
from ..handles import Experts, Linear, LinearPart, Router
from ..weights import Weights

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NativeLinear(Linear, Experts, Router):
    """Linear by address. weights: struct for the kernels. owners: the tensors that keep its memory."""

    weights: WeightsStruct
    quantized: bool
    name: str
    owners: tuple[object, ...] = field(repr=False)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.weights)

    @property
    def pointer(self) -> ctypes._Pointer[WeightsStruct]:
        return ctypes.pointer(self.weights)


class NativeWeights(Weights):
    """Handles that point into the stored weights. Static W8A8 linears are left to `torch`."""

    def __init__(self, torch: Weights):
        self.torch = torch

    def float_linear(self, weights: Sequence[Tensor], outputs: Sequence[Division | None] = ()) -> Linear:
        # Each output is a sum of its own, whatever is beside it.
        return native_linear([[LinearPart("a float weight", Scheme.FLOAT, weight) for weight in weights]])

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return native_linear([parts])

    def static_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return self.torch.static_linear(parts)

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return native_linear(experts)

    w8a8_experts = float_experts
    w4a8_experts = float_experts

    def router(self, weight: Tensor) -> Router:
        return native_linear([[LinearPart("router", Scheme.FLOAT, weight)]])

    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.torch.parameter(tensor, dtype)


def native_linear(groups: Sequence[Sequence[LinearPart]]) -> NativeLinear:
    """Make a handle of groups of parts, the same count in each, fused along their outputs.

    Raises BackendError where their shapes, dtypes or schemes do not allow it.
    """
    first = groups[0][0]
    owners: list[Tensor] = []
    parts = (Part * (len(groups) * len(groups[0])))()
    outputs = _outputs(groups[0])
    for group in groups:
        if len(group) != len(groups[0]) or _outputs(group) != outputs:
            raise BackendError(f"{group[0].name}: the experts of a layer must have one shape")
    for index, part in enumerate(part for group in groups for part in group):
        if (part.scheme, part.weight.dtype, part.weight.shape[1:]) != (
            first.scheme,
            first.weight.dtype,
            first.weight.shape[1:],
        ):
            raise BackendError(f"{part.name}: linears that run as one must be alike, {first.name} is not")
        height, weight, scale = _height(part), part.weight.contiguous(), part.scale
        where = address(weight, "linear", part.name, weight.dtype, *weight.shape)
        owners.append(weight)
        if part.scheme is Scheme.FLOAT:
            parts[index] = Part(where, None, height)
            continue
        if scale is None or scale.numel() != height or scale.dtype != torch.float32:
            found = None if scale is None else f"{list(scale.shape)} {scale.dtype}"
            raise BackendError(f"{part.name}: scale {found}, not float32 [{height}, 1]")
        scale = scale.contiguous()
        scale_where = address(scale, "linear", f"scale of {part.name}", torch.float32, *scale.shape)
        parts[index] = Part(where, scale_where, height)
        owners.append(scale)
    weights = WeightsStruct(parts, len(groups), len(groups[0]), first.weight.shape[1], outputs, _dtype_code(first))
    return NativeLinear(weights, first.scheme is not Scheme.FLOAT, first.name, (parts, *owners))


def matrices_address(x: Tensor, operator: str, name: str, heads: int, a: int, b: int) -> int:
    """Address of one float matrix a head, `[heads, a, b]`, with contiguous rows or columns."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{operator}: {name} is {x.dtype}; the native kernel takes {', '.join(map(str, _FLOATS))}")
    by_rows = x if x.stride(2) == 1 else x.transpose(1, 2)
    return rows_address(by_rows, operator, name, x.dtype, heads, *((a, b) if by_rows is x else (b, a)))


def _height(part: LinearPart) -> int:
    return part.weight.shape[0] * (2 if part.scheme is Scheme.W4A8 else 1)


def _outputs(group: Sequence[LinearPart]) -> int:
    return sum(_height(part) for part in group)


def _dtype_code(part: LinearPart) -> int:
    if part.weight.dim() != 2:
        raise BackendError(f"{part.name}: a weight of shape {list(part.weight.shape)} is no matrix")
    wanted = _FLOATS if part.scheme is Scheme.FLOAT else (torch.int8,)
    if part.weight.dtype not in wanted:
        raise BackendError(f"{part.name}: {part.scheme.value} weight of dtype {part.weight.dtype}")
    return INT4 if part.scheme is Scheme.W4A8 else DTYPES[part.weight.dtype]
