"""Scale search: one float32 scale for each output row, and the codes that follow from it.

`minmax` maps the largest magnitude to the largest code. `mse` takes the scale of least squared error: for int4 the
exact optimum over all scales (`optimal_scale`), for int8 a scale close to the optimum (`int8_scale`) and never worse
than the iterative search's.

Scales are compared by Σ w·q and Σ q², exact integers over 24-bit fixed-point weights, because float sums depend on
their order. So the result is the same for every grouping of rows, every number of threads, and both implementations
(torch here, native kernels in `native/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ..deferred import torch
from .int8_scale import FixedRows, int8_scale
from .optimal_scale import optimal_scale
from .rounding import code_sums, fixed_norm, rounded

if TYPE_CHECKING:
    from torch import Tensor

FIXED_POINT_BITS = 23
# The fixed point of int4 min-max errors: an int16 a weight, so that native kernels need no more instructions for the
# error than for the codes.
ERROR_BITS = 14
# Rows whose largest magnitude is below this are stored as zeros with scale 1: their scale's inverse would overflow.
TINY = 2.0**-100


class Method(str, Enum):
    """The search for codes: data-free from a row's scale, or GPTQ, whose scales are those of mse."""

    MINMAX = "minmax"
    MSE = "mse"
    GPTQ = "gptq"

    @property
    def scale_search(self) -> Method:
        """The data-free method of its scales."""
        return Method.MSE if self is Method.GPTQ else self


class NonFiniteError(ValueError):
    """An infinity or NaN in a weight; `row` is the first such row of the call's rows."""

    def __init__(self, row: int):
        super().__init__(f"row {row} holds an infinity or NaN")
        self.row = row


@dataclass(frozen=True)
class ScaledRows:
    """Codes int8 [R, K], scale float32 [R], and each row's squared error and squared norm, float64 [R].

    Both are exact sums over weights rounded to fixed point. Its unit u is 2^-23 (for int4 by min-max 2^-14) of the
    power of two above the row's largest magnitude. So the root of each is within √K · u / 2 of the exact value's.
    """

    codes: Tensor
    scale: Tensor
    squared_error: Tensor
    squared_norm: Tensor


def scale_rows(rows: Tensor, bits: int, method: Method) -> ScaledRows:
    """Choose a scale for every row of float32 [R, K] and round to signed codes of `bits` (4 or 8) bits.

    Codes are round-half-even(w / s) clamped to [−2^(bits−1), 2^(bits−1) − 1]. Rows are independent of each other. A
    row of zeros (or below 2**-100) has codes 0 and scale 1. ScaledRows gives the precision of the errors. Raises
    NonFiniteError for an infinity or NaN.
    """
    if rows.dtype != torch.float32 or rows.dim() != 2:
        raise ValueError(f"rows must be float32 [R, K], not {rows.dtype} {list(rows.shape)}")
    largest = _largest(rows)
    exponent = torch.frexp(largest)[1]
    tiny = largest < TINY
    fixed_bits = ERROR_BITS if bits == 4 and method is Method.MINMAX else FIXED_POINT_BITS
    shift = (fixed_bits - exponent).where(~tiny, 0)
    fixed = torch.ldexp(rows, shift[:, None]).round().to(torch.int32)
    fixed[tiny] = 0
    if method is Method.GPTQ:
        raise ValueError("GPTQ needs calibration: give its scale_search")
    if method is Method.MINMAX:
        scale = largest / (2 ** (bits - 1) - 1)
    else:
        a, b = optimal_scale(fixed) if bits == 4 else _int8_scale(rows, fixed, shift, ~tiny)
        real = a.to(torch.float64) / b.clamp(min=1).to(torch.float64)
        scale = torch.ldexp(real, -shift).to(torch.float32)
    scale = scale.where(~tiny, 1.0)
    codes = rounded(rows, scale.reciprocal(), bits)
    codes[tiny] = 0
    error, norm = _squared_error(fixed, codes, scale, shift)
    return ScaledRows(codes.to(torch.int8), scale, error, norm)


def _largest(rows: Tensor) -> Tensor:
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0])
    low, high = torch.aminmax(rows, dim=1)
    largest = torch.maximum(-low, high)
    finite = torch.isfinite(largest)
    if not bool(finite.all()):
        raise NonFiniteError(int((~finite).nonzero()[0, 0]))
    return largest


def _int8_scale(rows: Tensor, fixed: Tensor, shift: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The best states A and B, int64 [R], of the rows `chosen`, bool [R]; (0, 0) for the others."""
    a, b = torch.zeros(len(rows), dtype=torch.int64), torch.zeros(len(rows), dtype=torch.int64)
    a[chosen], b[chosen] = int8_scale(FixedRows(rows[chosen], fixed[chosen], shift[chosen]))
    return a, b


def _squared_error(fixed: Tensor, codes: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (w − s·q)² and Σ w² of weights that are `fixed` · 2^−shift, from exact sums, in float64."""
    a, b = (value.to(torch.float64) for value in code_sums(fixed, codes))
    norm = fixed_norm(fixed)
    sigma = torch.ldexp(scale.to(torch.float64), shift)
    error = (norm - 2 * sigma * a + sigma * sigma * b).clamp(min=0)
    return torch.ldexp(error, -2 * shift), torch.ldexp(norm, -2 * shift)
