"""Handles that keep stored parts, memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....formats.schemes import Scheme
from ...ranks.division import Division
from ..handles import Experts, Linear, LinearPart, Router
from ..weights import Weights


@dataclass(frozen=True)
class PartsLinear(Linear):
    """Linear of stored parts, side by side along the outputs."""

    parts: tuple[LinearPart, ...]

    @property
    def scheme(self) -> Scheme:
        return self.parts[0].scheme


@dataclass(frozen=True)
class PartsExperts(Experts):
    """Experts as a linear each."""

    linears: tuple[PartsLinear, ...]


@dataclass(frozen=True)
class StoredRouter(Router):
    """Router. weight: `[E, H]` in its stored dtype."""

    weight: Tensor


class ReferenceWeights(Weights):
    """Handles of stored weights, without a layout of their own."""

    def float_linear(self, weights: Sequence[Tensor], outputs: Sequence[Division | None] = ()) -> Linear:
        divisions = outputs or [None] * len(weights)
        return PartsLinear(
            tuple(
                LinearPart("", Scheme.FLOAT, weight, output_division=division)
                for weight, division in zip(weights, divisions, strict=True)
            )
        )

    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        return PartsLinear(tuple(parts))

    static_linear = w8a8_linear

    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        return PartsExperts(tuple(PartsLinear(tuple(parts)) for parts in experts))

    w8a8_experts = float_experts
    w4a8_experts = float_experts

    def router(self, weight: Tensor) -> Router:
        return StoredRouter(weight)

    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor if dtype is None else tensor.to(dtype)
