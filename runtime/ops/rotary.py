"""Rotary embedding of queries and keys, for every kind of attention."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Rotary(ABC):
    """Operators that rotate pairs of channels by the angles of their positions."""

    @abstractmethod
    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate interleaved pairs, half-split output: x `[T, N, D]`, cos/sin `[T, D]` → `[T, N, D]`.

        u = the even channels then the odd ones; out = u · cos + (−second half, first half of u) · sin.
        """

    @abstractmethod
    def rotary_mul(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate half-split pairs: x `[T, N, D]`, cos/sin `[T, D]` → `[T, N, D]`.

        out = x · cos + (−second half, first half of x) · sin.
        """
