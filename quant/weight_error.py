"""The error of a quantized weight: √(Σ (w − ŵ)² / Σ w²), from sums that can be added up over many weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class ErrorSums:
    """Sums over all elements of a weight: (w − ŵ)² of source values w and quantized ones ŵ, and w²."""

    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """As `relative_error` of the sums."""
        return relative_error(self.squared_error, self.squared_norm)


def relative_error(squared_error: float, squared_norm: float) -> float:
    """√(squared_error / squared_norm); 0 for an all-zero weight, which every scheme stores exactly."""
    return sqrt(squared_error / squared_norm) if squared_norm else 0.0
