"""Products of activations with weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from .handles import Activation, Experts, Linear, Router


class Products(ABC):
    """Matrix products. One method is one device call, or two where it quantizes its input first."""

    @abstractmethod
    def linear(self, x: Activation, linear: Linear) -> Tensor:
        """Multiply x `[rows, K]` by a handle of one of the `…_linear` methods → `[rows, N]` in the compute dtype.

        A W8A8 handle takes a `Quantized`, or quantizes a tensor with `dynamic_quant` first; the result is
        float32(int32 accumulator) · scale[n] · token_scale[m], in this order in float32, rounded once.
        A FLOAT handle takes a tensor only, and so does a static W8A8 one. The static handle quantizes it in float32 to
        clamp(round-half-even(x · f + offset)), f = 1 / scale in the compute dtype; the result is
        float32(int32 accumulator + quant_bias[n]) · deq_scale[n], rounded once.
        """

    def linears(self, x: Activation, linears: Sequence[Linear]) -> list[Tensor]:
        """Multiply x by each of some linears. Override to quantize it once."""
        return [self.linear(x, linear) for linear in linears]

    @abstractmethod
    def router_logits(self, x: Tensor, router: Router) -> Tensor:
        """Multiply x `[T, H]` by the router in float32 → float32 `[T, E]`."""

    @abstractmethod
    def batch_matmul(self, x: Tensor, weight: Tensor) -> Tensor:
        """Multiply by one matrix a head: x `[T, N, A]`, weight `[N, A, B]` → `[T, N, B]` in the compute dtype."""

    @abstractmethod
    def grouped_matmul(self, x: Activation, experts: Experts, group_list: Tensor) -> Tensor:
        """Multiply rows of x, sorted by expert, by their expert's weight → `[R, N]` in the compute dtype.

        group_list: int64 `[E]`, the number of rows of each expert.

        Quantized handles take a `Quantized` (consumed: the device may overwrite its codes), float ones a tensor.
        Numerics as in `linear`; rows past the sum of `group_list` are undefined.
        """
