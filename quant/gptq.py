"""GPTQ: codes are chosen column by column, and the later columns compensate each column's rounding error.

The error of a row w is (w − ŵ)ᵀ·H·(w − ŵ) = |Lᵀ·e|² with e = w − ŵ and H = L·Lᵀ. Number j of Lᵀ·e depends on e_j and
on the errors of the columns behind it. So columns are rounded from the last to the first, column j from its best value
given those, w_j + Σ_{i>j} L_ij·e_i / L_jj. That is GPTQ (Frantar et al., "GPTQ", 2022) exactly: there the same moves
come from the factor of H⁻¹, which is not needed. Columns come by rising H_jj, so that the largest is rounded first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .arithmetic import PANEL, Arithmetic
from .hessian import Factor


def gptq(weight: Tensor, factored: Factor, scale: Tensor, bits: int, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
    """Codes int8 [K, R], signed, of `bits` (4 or 8) bits, for a weight float32 [K, R] with scales float32 [R].

    Transposed, with columns in the factor's order, and R a multiple of LANES. Returns Lᵀ·e float32 [K, R] too.
    """
    lower = factored.lower
    codes, errors, sums = torch.empty_like(weight, dtype=torch.int8), torch.empty_like(weight), torch.zeros_like(weight)
    for panel in panels(weight.shape[0]):
        if panel.stop < weight.shape[0]:
            arithmetic.product(lower[panel.stop :, panel].T, errors[panel.stop :], sums[panel])
        arithmetic.gptq_columns(
            lower[panel, panel], bits, scale, weight[panel], sums[panel], errors[panel], codes[panel]
        )
    return codes, sums


def panels(columns: int) -> list[slice]:
    """Panels of columns, from the last to the first."""
    return [slice(start, min(start + PANEL, columns)) for start in range(0, columns, PANEL)][::-1]
