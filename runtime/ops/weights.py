"""Handles of stored weights, made when a model is loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ArtifactError
from ...formats.schemes import Scheme
from ..ranks.division import Division
from .handles import Experts, Linear, LinearPart, Router, RowParallel


class Weights(ABC):
    """Maker of handles: lays stored weights out for the backend's products."""

    def fusible(self, parts: Sequence[LinearPart]) -> list[list[LinearPart]]:
        """Group linears of one input into those that run as one: all if they share their scheme, else each alone."""
        return [list(parts)] if len({part.scheme for part in parts}) == 1 else [[part] for part in parts]

    def linear_of(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse parts of one scheme. Raises ArtifactError for different schemes, and for a scheme of experts only."""
        schemes = {part.scheme for part in parts}
        if schemes == {Scheme.FLOAT}:
            return self.float_linear([part.weight for part in parts], [part.output_division for part in parts])
        if schemes == {Scheme.W8A8}:
            return self.w8a8_linear(parts)
        names = ", ".join(f"{part.name} ({part.scheme.value})" for part in parts)
        if schemes != {Scheme.W8A8_STATIC}:
            raise ArtifactError(f"linears that run as one must share one scheme, W8A8_DYNAMIC, W8A8 or FLOAT: {names}")
        if len({part.static.inputs for part in parts if part.static is not None}) != 1:
            raise ArtifactError(f"linears that run as one must share input_scale and input_offset: {names}")
        return self.static_linear(parts)

    def row_parallel_of(self, part: LinearPart) -> Linear:
        """Make the handle that `Products.row_parallel` takes. Raises ArtifactError as `linear_of` does."""
        linear = self.linear_of([part])
        if part.input_division is None:
            return linear
        return RowParallel(linear, part.scheme, part.input_division, part.output_division)

    def experts_of(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """Stack experts of one scheme. Raises ArtifactError for different schemes, and for a static one."""
        schemes = {part.scheme for parts in experts for part in parts}
        if len(schemes) != 1:
            names = f"{experts[0][0].name} … {experts[-1][-1].name}"
            raise ArtifactError(
                f"a layer's routed experts must share one scheme, found {sorted(s.value for s in schemes)}: {names}"
            )
        if Scheme.W8A8_STATIC in schemes:
            raise ArtifactError(f"{experts[0][0].name}: routed experts cannot have a static input scale (W8A8)")
        make = {
            Scheme.FLOAT: self.float_experts,
            Scheme.W8A8: self.w8a8_experts,
            Scheme.W4A8: self.w4a8_experts,
        }[schemes.pop()]
        return make(experts)

    @abstractmethod
    def float_linear(self, weights: Sequence[Tensor], outputs: Sequence[Division | None] = ()) -> Linear:
        """Fuse float `[N_i, K]` weights (stored dtype) along their outputs: x `[T, K]` → `[T, ΣN_i]`.

        outputs: for each weight the division of its rows, where they are one rank's part, or None. Empty: all are
        whole. The products must equal those of the
        whole weights to the bit: a backend whose products depend on the number of outputs must look at it.
        """

    @abstractmethod
    def w8a8_linear(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse W8A8 parts (`weight` int8 `[N_i, K]`, `scale` float32 `[N_i, 1]`) along their outputs."""

    @abstractmethod
    def static_linear(self, parts: Sequence[LinearPart]) -> Linear:
        """Fuse W8A8 parts (`weight` int8 `[N_i, K]`, `static` with one InputScale for all) along their outputs."""

    @abstractmethod
    def float_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """Stack experts, for each its FLOAT parts to fuse along their outputs: (gate, up) or (down,)."""

    @abstractmethod
    def w8a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """Stack experts, for each its W8A8 parts to fuse along their outputs."""

    @abstractmethod
    def w4a8_experts(self, experts: Sequence[Sequence[LinearPart]]) -> Experts:
        """Stack experts, for each its W4A8 parts to fuse along their outputs; the N_i are even."""

    @abstractmethod
    def router(self, weight: Tensor) -> Router:
        """Make the handle of a router's float weight `[E, H]`."""

    @abstractmethod
    def parameter(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Put a norm gain, router bias, rope table or the embedding on the device; dtype None keeps its own."""
