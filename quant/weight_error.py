"""The weight error √(Σ (w − ŵ)² / Σ w²), from sums that add up over many weights."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt


@dataclass(frozen=True)
class ErrorSums:
    """Σ (w − ŵ)² and Σ w² over the source values w and quantized values ŵ of a weight or several."""

    squared_error: float
    squared_norm: float

    @property
    def relative_error(self) -> float:
        """The weight error of these sums."""
        return relative_error(self.squared_error, self.squared_norm)


def relative_error(squared_error: float, squared_norm: float) -> float:
    """√(squared_error / squared_norm); 0 for an all-zero weight, which every scheme stores exactly."""
    return sqrt(squared_error / squared_norm) if squared_norm else 0.0
