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

# Rows of one product of `output_error`.
_ROWS = 512
# At most so many; a sweep without a move is the last. On experts of the example: squared output error −10 % after one,
# −13 % after two, −15 % after three, on held-out inputs too.
SWEEPS = 4


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
        """The factor for the scale that minimizes E, and E by it; s·q is w − e. Rows without a positive one keep 1."""
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
    rows = torch.zeros(-(-count // LANES) * LANES, weight.shape[1], device=device)
    torch.index_select(weight.to(device), 1, order, out=rows[:count])
    step = torch.ones(rows.shape[0], device=device)
    step[:count] = scale.to(device)
    columns = rows.T.contiguous()
    found, sums = gptq(columns, factored, step, bits, arithmetic)
    start, scaled = _scaled_sums(columns, sums, factored, arithmetic)
    codes, found_step, gradient = found.T.contiguous(), step * scaled, _gradient(sums, factored, arithmetic)
    del found, sums
    inverse_diagonal = factored.hessian.diagonal().reciprocal()
    for _ in range(sweeps):
        if not arithmetic.descend(factored.hessian, inverse_diagonal, bits, found_step, gradient, codes):
            break
    last = _Sums(start.ww, *_row_sums(rows, codes, found_step, gradient, gradient))
    scaled, error = last.best_scale()
    found_step = found_step * scaled.float().to(device)
    plain, plain_error = _better_rounding(columns, step, bits, factored, arithmetic, error)
    error[plain] = plain_error
    plain = plain.to(device)
    codes[plain], found_step[plain] = _rounded(rows[plain], step[plain, None], bits).to(torch.int8), step[plain]
    # Without the part of the damping in both.
    lost, whole = _damping(rows, codes, found_step, factored.added)
    found = torch.index_select(codes[:count], 1, order.argsort())
    parts = (found_step, (error - lost).clamp(min=0), (start.ww - whole).clamp(min=0))
    return Calibrated(found.cpu(), *(part[:count].cpu() for part in parts))


def _rounded(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    return (weight * step.reciprocal()).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _scaled_sums(columns: Tensor, sums: Tensor, factored: Factor, arithmetic: Arithmetic) -> tuple[_Sums, Tensor]:
    """Give every row the best scale for its codes: its sums Lᵀ·e [K, R] become those by the new scale. Returns the sums
    before, and the factors float32 [R] of the scales. columns [K, R]: the weight."""
    outputs, kept = torch.empty_like(columns), torch.zeros(3, columns.shape[1], dtype=torch.float64)
    for panel in panels(columns.shape[0]):
        output, sum_ = outputs[panel], sums[panel]
        arithmetic.product(factored.lower[panel.start :, panel].T, columns[panel.start :], output)
        kept += torch.stack([(a * b).sum(0) for a, b in ((output, output), (output, sum_), (sum_, sum_))]).cpu()
    found = _Sums(*kept)
    scaled = found.best_scale()[0].float().to(columns.device)
    for panel in panels(columns.shape[0]):
        # Lᵀ·(w − f·s·q) = Lᵀ·w − f·(Lᵀ·w − Lᵀ·e).
        sums[panel].sub_(outputs[panel]).mul_(scaled).add_(outputs[panel])
    return found, scaled


def _gradient(sums: Tensor, factored: Factor, arithmetic: Arithmetic) -> Tensor:
    """L · sums, of sums float32 [K, R], transposed: [R, K]."""
    gradient = torch.empty(sums.shape[1], sums.shape[0], device=sums.device)
    for panel in panels(sums.shape[0]):
        arithmetic.product(sums[: panel.stop].T, factored.lower[panel, : panel.stop].T, gradient[:, panel])
    return gradient


def _row_sums(rows: Tensor, codes: Tensor, step: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Σ w · first and Σ e · second of each row, float64 [R], of rows w [R, K] and e = w − step · codes."""
    found = []
    for part in _few(rows.shape[0]):
        errors = torch.addcmul(rows[part], codes[part].to(torch.float32), step[part, None], value=-1)
        found.append(torch.stack([(rows[part] * first[part]).sum(1), (errors * second[part]).sum(1)]))
    both = torch.cat(found, 1).cpu().double()
    return both[0], both[1]


def _damping(rows: Tensor, codes: Tensor, step: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Σ added · e² and Σ added · w² of each row, float64 [R]."""
    found = []
    for part in _few(rows.shape[0]):
        errors = torch.addcmul(rows[part], codes[part].to(torch.float32), step[part, None], value=-1)
        found.append(torch.stack([errors.square_() @ added, rows[part].square() @ added]))
    both = torch.cat(found, 1).cpu().double()
    return both[0], both[1]


def _few(rows: int) -> list[slice]:
    """Rows a few at a time: temporary tensors then stay in the cache."""
    return [slice(start, start + 32) for start in range(0, rows, 32)]


def _better_rounding(
    columns: Tensor, step: Tensor, bits: int, factored: Factor, arithmetic: Arithmetic, limit: Tensor
) -> tuple[Tensor, Tensor]:
    """The rows int64 [P] of columns [K, R] whose plain rounding has a smaller E than `limit` [R], or that is no number,
    and that E: both on the CPU.

    E is a sum of squares over columns, of which the last are the largest and cheapest: rows leave once they exceed it.
    """
    left, error = torch.arange(limit.shape[0]), torch.zeros_like(limit)
    errors, steps = torch.empty_like(columns), step
    for panel in panels(columns.shape[0]):
        part = columns[panel][:, left.to(columns.device)]
        errors[panel] = torch.addcmul(part, _rounded(part, steps, bits), steps, value=-1)
        sums = arithmetic.product(factored.lower[panel.start :, panel].T, errors[panel.start :])
        error += (sums * sums).sum(0).cpu()
        keep = ~(error >= limit[left])
        if int(keep.sum()) <= 0.75 * left.shape[0] or panel.start == 0:
            kept = torch.empty(errors.shape[0], int(keep.sum()), device=errors.device)
            kept[panel.start :] = errors[panel.start :, keep.to(errors.device)]
            left, error, errors, steps = left[keep], error[keep], kept, steps[keep.to(errors.device)]
        if not left.shape[0]:
            break
    return left, error


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor, arithmetic: Arithmetic) -> tuple[float, float]:
    """Σ (w − ŵ)ᵀ·H·(w − ŵ) and Σ wᵀ·H·w over the rows of two weights float32 [N, K]."""
    lost = whole = 0.0
    for part, found in zip(weight.split(_ROWS), quantized.split(_ROWS), strict=True):
        part, found = part.to(arithmetic.device), found.to(arithmetic.device)
        difference = part - found
        lost += float((arithmetic.product(difference, hessian) * difference).sum(1).double().sum())
        whole += float((arithmetic.product(part, hessian) * part).sum(1).double().sum())
    return lost, whole
