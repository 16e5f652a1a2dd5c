"""Norms, activation functions and quantization: operators on rows."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .handles import Quantized


class Norms(ABC):
    """Operators on rows. One method is one device call."""

    @abstractmethod
    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Rows of `table` `[vocab, H]` (stored dtype), in the compute dtype: `[T, H]`."""

    @abstractmethod
    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        """x · rsqrt(mean(x²) + eps) · gamma over the last dimension, float32 inside, rounded once."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(norm of the sum, the sum), both `[T, H]`. bf16: normalised sum is rounded before it is times gamma."""

    @abstractmethod
    def swiglu(self, x: Tensor) -> Tensor:
        """silu(left half) · right half: `[rows, 2·I]` → `[rows, I]`, float32 inside."""

    @abstractmethod
    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        """Per row: f = 127 / max|x|, codes = round-half-even(x · f), scale = 1 / f. A zero row gives zeros.

        With `smooth`, float `[K]`, of x · smooth instead, in float32.
        """

    @abstractmethod
    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        """y = swiglu(x) in float32, then per row scale = max|y| / 127, codes = round-half-even(y / scale)."""
