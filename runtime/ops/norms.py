"""Norms, activation functions and quantization: operators on rows."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from .handles import Quantized


class Norms(ABC):
    """Operators on rows. One method is one device call."""

    @abstractmethod
    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        """Look up rows of `table` `[vocab, H]` (stored dtype): `[T, H]` in the compute dtype."""

    @abstractmethod
    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        """RMS norm: x · rsqrt(mean(x²) + eps) · gamma over the last dimension, float32 inside, rounded once."""

    @abstractmethod
    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Add, then norm: (norm of the sum, the sum), `[T, H]` each. bf16: rounded before the product with gamma."""

    @abstractmethod
    def layer_norm(self, x: Tensor, gamma: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Layer norm: (x − mean) · rsqrt(variance + eps) · gamma + bias over the last dimension.

        gamma and bias are float32, and so is all inside.
        """

    @abstractmethod
    def swiglu(self, x: Tensor) -> Tensor:
        """SwiGLU, silu(left half) · right half: `[rows, 2·I]` → `[rows, I]`, float32 inside."""

    @abstractmethod
    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        """Quantize per row: f = 127 / max|x|, codes = round-half-even(x · f), scale = 1 / f. A zero row gives zeros.

        smooth: None, or float `[K]`; then x · smooth, in float32, is quantized.
        """

    @abstractmethod
    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        """SwiGLU, then quantize per row: scale = max|y| / 127, codes = round-half-even(y / scale), y in float32."""

    @abstractmethod
    def row_maximum(self, x: Tensor) -> Tensor:
        """Greatest |x| of each row of `[rows, K]` (compute dtype or float32): float32 `[rows]`.

        Infinity for a row with an infinity or NaN: unlike a NaN, it stays the greatest of several rows' maxima.
        """

    @abstractmethod
    def dynamic_quant_by(self, x: Tensor, largest: Tensor) -> Quantized:
        """Quantize a part of each row as `dynamic_quant` does the whole row.

        largest: float32 `[rows]`, `row_maximum` of the whole rows.
        """

    @abstractmethod
    def swiglu_float32(self, x: Tensor) -> Tensor:
        """SwiGLU that is not rounded: `[rows, 2·I]` → float32 `[rows, I]`, as `dequant_swiglu_quant` quantizes it."""

    @abstractmethod
    def swiglu_quant_by(self, activated: Tensor, largest: Tensor) -> Quantized:
        """Quantize a part of each row of `swiglu_float32` as `dequant_swiglu_quant` does the whole row.

        largest: float32 `[rows]`, `row_maximum` of the whole rows.
        """
