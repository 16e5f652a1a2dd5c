"""Products of activations with weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from ...formats.schemes import Scheme
from .handles import Activation, Experts, Linear, Quantized, Router, RowParallel
from .norms import Norms


class Products(ABC):
    """Matrix products. One method is one device call, or two where it quantizes its input first."""

    norms: Norms

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

    @abstractmethod
    def static_quant(self, x: Tensor, linear: Linear) -> Tensor:
        """Quantize rows `[rows, K]` as the static W8A8 handle `linear` does: int8 `[rows, K]`."""

    @abstractmethod
    def integer_sums(self, codes: Tensor, linear: Linear) -> Tensor:
        """Multiply codes int8 `[rows, K]` by those of a W8A8 or static W8A8 handle → int32 `[rows, N]`.

        No scale, no quant_bias. A sum wraps like int32.
        """

    @abstractmethod
    def scale_sums(self, sums: Tensor, scale: Tensor | None, linear: Linear) -> Tensor:
        """Scale whole sums int32 `[rows, N]` as `linear` does its accumulators → `[rows, N]` in the compute dtype.

        scale: float32 `[rows]`, of the rows' codes; None for a static handle, which adds its quant_bias first.
        """

    def row_parallel(self, x: Activation, linear: Linear) -> Tensor:
        """Multiply `[rows, K]` by a handle of `Weights.row_parallel_of` → `[rows, N]`, on every rank.

        The ranks divide K: x is this rank's columns. A `Quantized` has the codes of this rank's columns, with one scale
        for the whole row. The result equals `linear` of the whole rows and weights to the bit:

        * W8A8: the greatest |x| over the ranks gives one scale; int32 products are added over the ranks, then scaled
          and rounded once. Scales of each rank's own would be those of another model.
        * static W8A8: the same with the stored scale; quant_bias is added once, to the sum.
        * FLOAT: the ranks join x, multiply it by some of the outputs each, and join those.
        """
        if not isinstance(linear, RowParallel):
            return self.linear(x, linear)
        group = linear.inputs.group
        if linear.outputs is not None:
            assert isinstance(x, Tensor)
            return linear.outputs.join(self.linear(linear.inputs.join(x), linear.linear))
        if linear.scheme is Scheme.W8A8_STATIC:
            assert isinstance(x, Tensor)
            codes, scale = self.static_quant(x, linear.linear), None
        else:
            codes, scale = self._common_scale(x, linear)
        sums = group.all_reduce_sum(self.integer_sums(codes, linear.linear))
        return self.scale_sums(sums, scale, linear.linear)

    def _common_scale(self, x: Activation, linear: RowParallel) -> Quantized:
        if isinstance(x, Quantized):
            return x
        return self.norms.dynamic_quant_by(x, linear.inputs.group.all_reduce_max(self.norms.row_maximum(x)))
