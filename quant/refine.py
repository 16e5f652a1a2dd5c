"""Calibrated codes and scales: GPTQ's one greedy pass, refined by coordinate descent.

For a row w with codes q and scale s the output error is E(q, s) = (w − s·q)ᵀ·H·(w − s·q). Two moves follow GPTQ: the
scale, s = qᵀ·H·w / qᵀ·H·q, and one code at a time, column after column (coordinate descent, as in Behdin et al.,
"QuantEase", 2023). Each minimizes E exactly in its variable, so that E never rises.

Everything comes from Lᵀ·w and Lᵀ·e, with H = L·Lᵀ and e = w − s·q: E is |Lᵀ·e|², the gradient H·e is L·(Lᵀ·e), and the
descent keeps it up to date. H itself is needed only in its rows of moved codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .arithmetic import LANES, Arithmetic
from .gptq import gptq, panels
from .hessian import Factor

# At most so many; a sweep without a move is the last. On experts of the example: squared output error −10 % after one,
# −13 % after two, −15 % after three, on held-out inputs too.
SWEEPS = 2


@dataclass(frozen=True)
class Calibrated:
    """Codes int8 [N, K] and scales float32 [N] of a weight, and each row's squared output error and squared output,
    float64 [N], without the damping."""

    codes: Tensor
    scale: Tensor
    squared_error: Tensor
    squared_norm: Tensor


@dataclass(frozen=True)
class _Sums:
    """Products of each row with H, float64 [R]: wᵀHw, wᵀHe and eᵀHe."""

    ww: Tensor
    we: Tensor
    ee: Tensor

    def best_scale(self) -> tuple[Tensor, Tensor]:
        """The factor for the scale that minimizes E, and E by it. s·q is w − e; rows without a positive factor keep 1."""
        a, b = self.ww - self.we, self.ww - 2 * self.we + self.ee
        # (w − e)ᵀ·H·e: by how much the scale is off.
        slope = self.we - self.ee
        factor = 1 + slope / b
        usable = (b > 0) & (a > 0) & torch.isfinite(factor) & (factor > 0)
        return factor.where(usable, 1.0), (self.ee - slope * slope / b).where(usable, self.ee)


def calibrated_codes(
    weight: Tensor, factored: Factor, scale: Tensor, bits: int, arithmetic: Arithmetic, sweeps: int = SWEEPS
) -> Calibrated:
    """Choose codes and scales of a weight float32 [N, K] by GPTQ with the scales float32 [N], refined.

    A greedy pass can lose where it clips: rows with a smaller error by plain rounding keep plain rounding.
    """
    count, order, device = weight.shape[0], factored.order, arithmetic.device
    rows = weight.new_zeros(-(-count // LANES) * LANES, weight.shape[1], device=device)
    torch.index_select(weight.to(device), 1, order, out=rows[:count])
    step = torch.ones(rows.shape[0], device=device)
    step[:count] = scale.to(device)
    columns = rows.T.contiguous()
    codes, sums = gptq(columns, factored, step, bits, arithmetic)
    outputs = _outputs(columns, factored, arithmetic)
    ww = _squares(outputs)
    start = _Sums(ww, _dots(outputs, sums), _squares(sums))
    factor, _ = start.best_scale()
    # Lᵀ·(w − f·s·q) = Lᵀ·w − f·(Lᵀ·w − Lᵀ·e).
    sums.sub_(outputs).mul_(factor.float()).add_(outputs)
    del outputs
    found_step, found = step * factor.float(), codes.T.contiguous()
    del codes
    gradient = _gradient(sums, factored, arithmetic)
    del sums
    inverse_diagonal = factored.hessian.diagonal().reciprocal()
    for _ in range(sweeps):
        if not arithmetic.descend(factored.hessian, inverse_diagonal, bits, found_step, gradient, found):
            break
    errors = torch.addcmul(rows, found.to(torch.float32), found_step[:, None], value=-1)
    last = _Sums(ww, _dots(rows, gradient, 1), _dots(errors, gradient, 1))
    del gradient
    factor, error = last.best_scale()
    found_step = found_step * factor.float()
    rounded = (rows * step.reciprocal()[:, None]).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    plain = _errors_up_to(torch.addcmul(rows, rounded, step[:, None], value=-1), factored, arithmetic, error)
    worse = ~(error <= plain)  # of a NaN too
    found[worse], found_step[worse] = rounded[worse].to(torch.int8), step[worse]
    error = torch.where(worse, plain, error)
    errors = torch.addcmul(rows, found.to(torch.float32), found_step[:, None], value=-1)
    # What damping added to both.
    added = factored.added.double()
    error = (error - errors.double().square() @ added).clamp(min=0)
    norm = (ww - rows.double().square() @ added).clamp(min=0)
    result = torch.empty_like(found)
    result[:, order] = found
    return Calibrated(*(x[:count].cpu() for x in (result, found_step, error, norm)))


def _dots(a: Tensor, b: Tensor, dim: int = 0) -> Tensor:
    """Sums of products along a dimension, in float64."""
    return torch.linalg.vecdot(a.double(), b.double(), dim=dim)


def _squares(a: Tensor) -> Tensor:
    return _dots(a, a)


def _outputs(columns: Tensor, factored: Factor, arithmetic: Arithmetic) -> Tensor:
    """Lᵀ · columns, of columns float32 [K, R]."""
    outputs = torch.empty_like(columns)
    for panel in panels(columns.shape[0]):
        outputs[panel] = arithmetic.product(factored.lower[panel.start :, panel].T, columns[panel.start :])
    return outputs


def _gradient(sums: Tensor, factored: Factor, arithmetic: Arithmetic) -> Tensor:
    """L · sums, of sums float32 [K, R], transposed: [R, K]."""
    gradient = torch.empty_like(sums.T, memory_format=torch.contiguous_format)
    for panel in panels(sums.shape[0]):
        gradient[:, panel] = arithmetic.product(sums[: panel.stop].T, factored.lower[panel, : panel.stop].T)
    return gradient


def _errors_up_to(errors: Tensor, factored: Factor, arithmetic: Arithmetic, limit: Tensor) -> Tensor:
    """E float64 [R] of errors [R, K], or for a row that exceeds its limit [R] some number above it.

    E is a sum of squares over columns, of which the last are the cheapest and largest: rows leave once they exceed it.
    """
    found = torch.zeros_like(limit)
    left, columns = torch.arange(limit.shape[0], device=limit.device), errors.T.contiguous()
    for panel in panels(errors.shape[1]):
        found[left] += _squares(arithmetic.product(factored.lower[panel.start :, panel].T, columns[panel.start :]))
        keep = ~(found[left] > limit[left])
        if int(keep.sum()) <= 0.75 * left.shape[0]:
            left, columns = left[keep], columns[:, keep].contiguous()
        if not left.shape[0]:
            break
    return found


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor, arithmetic: Arithmetic) -> tuple[float, float]:
    """Σ (w − ŵ)ᵀ·H·(w − ŵ) and Σ wᵀ·H·w over the rows of two weights float32 [N, K]."""
    lost = whole = 0.0
    for part, found in zip(weight.split(_ROWS), quantized.split(_ROWS), strict=True):
        part, found = part.to(arithmetic.device), found.to(arithmetic.device)
        difference = part - found
        lost += float(_dots(arithmetic.product(difference, hessian), difference, 1).sum())
        whole += float(_dots(arithmetic.product(part, hessian), part, 1).sum())
    return lost, whole


_ROWS = 512
