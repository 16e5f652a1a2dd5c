"""What `tuning_config` tells the grouped matmul: the number of rows to expect for an expert.

The operator tiles for it. In W4A8, more than a quarter of the outputs makes it expand the weights to int8 first, which
is faster for many rows (CANN's tiling of GroupedMatmul). It refuses more than the rows of the call
(`CheckTuningConfig` of aclnnGroupedMatmulV5). Results do not depend on it, but for the float16 steps of W4A8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from ..weights import INT4_PER_INT32, QuantizedExperts, W4A8Experts


class Expectation(str, Enum):
    """Advice to the operator.

    NONE: nothing. MEAN: the mean of the call's rows over the experts. EXPANDED: enough to expand W4A8 weights.
    """

    NONE = "none"
    MEAN = "mean"
    EXPANDED = "expanded"

    def value_for(self, rows: int, experts: int, outputs: int) -> list[int] | None:
        """`tuning_config` of a call; None where the operator would not take it."""
        if self is Expectation.MEAN and rows:
            return [-(-rows // experts)]
        expanding = outputs // 4 + 1
        return [expanding] if self is Expectation.EXPANDED and expanding <= rows else None


@dataclass(frozen=True)
class MatmulShape:
    """A grouped matmul: bits of a weight (4 or 8), experts, input and output features, and rows.

    rows: rounded up to a power of two.
    """

    bits: int
    experts: int
    inputs: int
    outputs: int
    rows: int

    @classmethod
    def of(cls, weights: QuantizedExperts, rows: int) -> MatmulShape:
        """The shape of a call with so many rows."""
        experts, inputs, packed = weights.weight.shape
        if isinstance(weights, W4A8Experts):
            return cls(4, experts, inputs, packed * INT4_PER_INT32, power_of_two(rows))
        return cls(8, experts, inputs, packed, power_of_two(rows))

    @property
    def candidates(self) -> tuple[Expectation, ...]:
        """Expectations that differ for it."""
        expands = self.bits == 4 and self.outputs // 4 < self.rows
        return (Expectation.NONE, Expectation.MEAN, *([Expectation.EXPANDED] if expands else []))


@dataclass(frozen=True)
class Tuning:
    """The expectations to use on one device, by shape; for other shapes the operator is told nothing."""

    chosen: Mapping[MatmulShape, Expectation] = field(default_factory=dict)

    def config_for(self, weights: QuantizedExperts, rows: int) -> list[int] | None:
        """`tuning_config` of a grouped matmul of so many rows."""
        if not self.chosen:
            return None
        shape = MatmulShape.of(weights, rows)
        return self.chosen.get(shape, Expectation.NONE).value_for(rows, shape.experts, shape.outputs)


def power_of_two(count: int) -> int:
    """The smallest power of two that is not below a positive number."""
    return 1 << max(0, count - 1).bit_length()
