"""GPTQ: codes are chosen column by column, and the later columns compensate each column's rounding error.

For a linear y = W·x with calibration inputs x, the error Σ |W·x − Ŵ·x|² = Σ rows (w − ŵ)ᵀ·H·(w − ŵ), H = Σ x·xᵀ. With
the upper Cholesky factor U of H⁻¹ (H⁻¹ = Uᵀ·U), rounding column j to q and adding −(w_j − q) / U_jj · U_j,k to every
later column k is the optimal correction (Frantar et al., "GPTQ", 2022). Columns are ordered by falling H_jj, and all
sums are float64. The given scales stay fixed; refine.py then improves codes and scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
# Damping goes up to this multiple of the mean of H's diagonal before a Hessian counts as singular.
_MOST_DAMPING = 1.0
_BLOCK = 64
_ROWS = 512


class SingularHessianError(ArithmeticError):
    """A Hessian that no damping makes positive definite."""


class Hessian:
    """`sum` = Σ x·xᵀ over rows x [T, K], float64 [K, K], and the number of `rows`."""

    def __init__(self, size: int):
        self.sum = torch.zeros(size, size, dtype=torch.float64)
        self.rows = 0


@dataclass(frozen=True)
class Factor:
    """A factored Hessian: the damped Hessian [K, K], the upper factor U [K, K] of its permuted inverse, both float64,
    and the order of columns."""

    hessian: Tensor
    upper: Tensor
    order: Tensor  # int64 [K]: column `order[j]` is the j-th to be rounded
    damping: float


def factor(hessian: Tensor, damping: float = DAMPING) -> Factor:
    """Factor a Hessian float64 [K, K], or any multiple of it, once for all linears that share their inputs.

    `damping` times the mean of the diagonal is added to the diagonal, and ten times more after each failed
    factorization. Channels that were never active (zero on the diagonal) are rounded without correction. Raises
    SingularHessianError.
    """
    diagonal = hessian.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise SingularHessianError("holds infinities or NaN")
    mean = float(diagonal.mean())
    if mean <= 0:
        raise SingularHessianError("is zero: no calibration input was active")
    order = diagonal.argsort(descending=True, stable=True)
    dead = diagonal == 0
    while damping <= _MOST_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        damped.diagonal()[dead] = mean
        upper = _inverse_factor(damped[order][:, order])
        if upper is not None:
            return Factor(damped, upper, order, damping)
        damping *= 10
    raise SingularHessianError(f"cannot be factored even with {_MOST_DAMPING:g} of its mean diagonal added")


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """The upper Cholesky factor of the inverse; None where it is not positive definite. `hessian` is overwritten."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if bool(failed):
        return None
    # At most two matrices of this size live at once beside the caller's.
    inverse = torch.cholesky_inverse(lower, out=hessian)
    upper, failed = torch.linalg.cholesky_ex(inverse, upper=True, out=(lower, failed))
    return None if bool(failed) or not bool(torch.isfinite(upper.diagonal()).all()) else upper


def gptq(weight: Tensor, factored: Factor, scale: Tensor, bits: int) -> Tensor:
    """Codes int8 [N, K] for a weight float [N, K] with scales float32 [N]: signed, of `bits` (4 or 8) bits."""
    bound = 2 ** (bits - 1)
    rest = weight.to(torch.float64)[:, factored.order]
    # One row a column of the weight, so that the inner loop's memory is contiguous.
    rest = rest.T.contiguous()
    step = scale.to(torch.float64)
    codes = torch.empty(rest.shape, dtype=torch.int8)
    upper, columns = factored.upper, rest.shape[0]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors = torch.empty(end - start, rest.shape[1], dtype=torch.float64)
        for j in range(start, end):
            code = (rest[j] / step).round_().clamp_(-bound, bound - 1)
            codes[j] = code.to(torch.int8)
            error = (rest[j] - code * step) / upper[j, j]
            errors[j - start] = error
            if j + 1 < end:
                rest[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        if end < columns:
            rest[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    result = torch.empty(weight.shape, dtype=torch.int8)
    result[:, factored.order] = codes.T
    return result


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """Σ (w − ŵ)ᵀ·H·(w − ŵ) / Σ wᵀ·H·w over the rows of two weights float [N, K]: the squared relative output error."""
    lost = whole = 0.0
    for start in range(0, weight.shape[0], _ROWS):
        part = weight[start : start + _ROWS].to(torch.float64)
        difference = part - quantized[start : start + _ROWS].to(torch.float64)
        lost += float(((difference @ hessian) * difference).sum())
        whole += float(((part @ hessian) * part).sum())
    return lost / whole if whole > 0 else 0.0
