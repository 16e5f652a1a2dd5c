"""The Hessian of a linear's output error, and its Cholesky factor.

For a linear y = W·x with calibration inputs x, the error Σ |W·x − Ŵ·x|² = Σ rows (w − ŵ)ᵀ·H·(w − ŵ), H = Σ x·xᵀ.

float32 is safe here. Rounding in H, and in its Cholesky factorization, is relative to √(H_ii · H_jj), however unlike
the channels are (Higham, "Accuracy and Stability of Numerical Algorithms", 10.1); the damping, a hundredth of the mean
diagonal, is far above it. Only where a pivot shows otherwise is H factored in float64: without rounding, no pivot of
H + λ·I is below λ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel.pool import Mapper
from .arithmetic import PANEL, Arithmetic

DAMPING = 0.01
# Damping goes up to this multiple of the mean of H's diagonal before a Hessian counts as singular.
_MOST_DAMPING = 1.0
# The least pivot of a float32 factorization, as a share of the damping.
_LEAST_PIVOT = 0.9
# Rows or columns of one product. Threads share products, and no result depends on their number.
_PIECE = 1024
# Rows of inputs whose products are summed before they are added to the others: sums of sums round less.
_TOKENS = 4096


class SingularHessianError(ArithmeticError):
    """A Hessian that no damping makes positive definite."""


class Hessian:
    """H = Σ x·xᵀ over rows x [T, K], float32 [K, K], and the number of `rows`."""

    def __init__(self, size: int, arithmetic: Arithmetic):
        self._arithmetic = arithmetic
        # Below the diagonal blocks; `symmetric` copies them above.
        self._sum = torch.zeros(size, size, device=arithmetic.device)
        self._complete = True
        self.rows = 0

    def add(self, x: Tensor, mapper: Mapper, mine: Callable[[int], bool] = lambda index: True) -> None:
        """Add rows float32 [T, K]; of the sum only those of its `pieces` that are `mine`, by their indices.

        Where none is, x may be a tensor without values.
        """
        columns = [start for index, start in enumerate(self.starts(x.shape[1])) if mine(index)]
        for part in x.to(self._arithmetic.device).split(_TOKENS) if columns else ():

            def products(start: int, part: Tensor = part) -> Tensor:
                return self._arithmetic.product(part[:, start:].T, part[:, start : start + _PIECE])

            for start, product in zip(columns, mapper.map(products, columns), strict=True):
                self._sum[start:, start : start + _PIECE] += product
        self.rows += x.shape[0]
        self._complete = False

    def pieces(self) -> Iterator[Tensor]:
        """The pieces of the sum, as views: some columns of the lower triangle each."""
        for start in self.starts(self._sum.shape[0]):
            yield self._sum[start:, start : start + _PIECE]

    @staticmethod
    def starts(size: int) -> range:
        """The first column of each of the pieces of a sum [size, size]."""
        return range(0, size, _PIECE)

    def symmetric(self) -> Tensor:
        """H [K, K]."""
        if not self._complete:
            for start in range(0, self._sum.shape[0], _PIECE):
                end = start + _PIECE
                self._sum[start:end, end:] = self._sum[end:, start:end].T
                block = self._sum[start:end, start:end].tril()
                self._sum[start:end, start:end] = block + block.tril(-1).T
            self._complete = True
        return self._sum


@dataclass(frozen=True)
class Factor:
    """A factored Hessian: H + damping [K, K] with columns by rising H_jj, its lower Cholesky factor [K, K], and what
    was added to the diagonal [K]: all float32. Column j of both is column `order[j]` of the linear."""

    hessian: Tensor
    lower: Tensor
    added: Tensor
    order: Tensor
    damping: float


def factor(
    matrix: Tensor, arithmetic: Arithmetic, mapper: Mapper, damping: float = DAMPING, divided: Mapper | None = None
) -> Factor:
    """Factor H float32 [K, K], or any multiple of it, once for all linears that share their inputs.

    `damping` times the mean of the diagonal is added to the diagonal, and ten times more after each failed
    factorization. Channels that were never active (zero on the diagonal) are rounded without correction. divided: a
    mapper of several processes that all have H, and divide the products; None for `mapper`. Raises
    SingularHessianError.
    """
    diagonal = matrix.diagonal().cpu()
    if not bool(torch.isfinite(diagonal).all()):
        raise SingularHessianError("holds infinities or NaN")
    mean = float(diagonal.double().mean())
    if mean <= 0:
        raise SingularHessianError("is zero: no calibration input was active")
    plain, order = diagonal.sort(stable=True)
    order = order.to(arithmetic.device)
    hessian = _reordered(matrix, order, mapper)
    while damping <= _MOST_DAMPING:
        added = torch.where(plain == 0, mean, damping * mean).to(torch.float32)
        hessian.diagonal().copy_(plain + added)
        lower = cholesky(hessian, arithmetic, divided or mapper)
        if lower is None or float(lower.diagonal().min()) ** 2 < _LEAST_PIVOT * damping * mean:
            lower = None  # its memory, before more is taken
            lower = _double_cholesky(hessian)
        if lower is not None:
            return Factor(hessian, lower, added.to(arithmetic.device), order, damping)
        damping *= 10
    raise SingularHessianError(f"cannot be factored even with {_MOST_DAMPING:g} of its mean diagonal added")


def _reordered(matrix: Tensor, order: Tensor, mapper: Mapper) -> Tensor:
    """The matrix with rows and columns in another order."""
    result = torch.empty_like(matrix)

    def copy(part: slice) -> None:
        torch.index_select(matrix[order[part]], 1, order, out=result[part])

    for _ in mapper.map(copy, _pieces(0, matrix.shape[0])):
        pass
    return result


def _pieces(start: int, end: int) -> Iterator[slice]:
    for first in range(start, end, _PIECE):
        yield slice(first, min(first + _PIECE, end))


def cholesky(matrix: Tensor, arithmetic: Arithmetic, mapper: Mapper) -> Tensor | None:
    """The lower Cholesky factor float32 of a symmetric matrix float32 [K, K]; None where it is not positive definite.

    Panel after panel of columns, minus the product of those before it; the blocks on the diagonal in float64.
    """
    size, lower = matrix.shape[0], torch.zeros_like(matrix)
    for start in range(0, size, PANEL):
        panel = slice(start, min(start + PANEL, size))

        def subtract(part: slice, panel: slice = panel) -> None:
            lower[part, panel] = matrix[part, panel]
            arithmetic.product(
                lower[part, : panel.start], lower[panel, : panel.start].T, lower[part, panel], subtract=True
            )

        subtract(panel)
        block, failed = torch.linalg.cholesky_ex(lower[panel, panel].cpu().double())
        if bool(failed):
            return None
        inverse = torch.linalg.solve_triangular(block, torch.eye(block.shape[0], dtype=block.dtype), upper=False)
        inverse = inverse.float().T.to(arithmetic.device)
        lower[panel, panel] = block.float().to(arithmetic.device)

        def divide(
            part: slice,
            panel: slice = panel,
            inverse: Tensor = inverse,
            subtract: Callable[[slice], None] = subtract,
        ) -> Tensor:
            subtract(part)
            return arithmetic.product(lower[part, panel], inverse)

        parts = list(_pieces(panel.stop, size))
        for part, piece in zip(parts, mapper.map(divide, parts), strict=True):
            lower[part, panel] = piece  # of another process, maybe
    return lower if bool(torch.isfinite(lower.diagonal()).all()) else None


def _double_cholesky(matrix: Tensor) -> Tensor | None:
    """The factor computed in float64, rounded to float32."""
    lower, failed = torch.linalg.cholesky_ex(matrix.cpu().double())
    if bool(failed) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    return lower.float().to(matrix.device)
