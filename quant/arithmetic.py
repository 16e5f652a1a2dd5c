"""Calibration's arithmetic in float32: products, GPTQ's columns, sweeps of coordinate descent.

`TorchArithmetic` runs on any torch device. The native kernels (`native/calibration.py`) compute the same in an order of
their own, so that codes near a rounding boundary may differ between the two.
"""

from __future__ import annotations

from typing import Final, Protocol

import torch
from torch import Tensor

# Rows of one call are a multiple of this: the widest vector has as many lanes.
LANES: Final = 16
# Columns of a panel: errors within it are passed on column by column, beyond it by a product.
PANEL: Final = 256


class Arithmetic(Protocol):
    """Float32 operators on tensors of one device."""

    device: torch.device

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None, *, subtract: bool = False) -> Tensor:
        """a `[M, K]` · b `[K, N]`, of any strides, in `out` `[M, N]` where it is given; `subtract`: out − a · b."""
        ...

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x `[T, K]` · weight `[N, K]`ᵀ, float32 on the CPU, as is the result `[T, N]`."""
        ...

    def gptq_columns(
        self, lower: Tensor, bits: int, scale: Tensor, weight: Tensor, sums: Tensor, errors: Tensor, codes: Tensor
    ) -> None:
        """Round a panel of columns from the last to the first, each moved to compensate the errors of those behind it.

        lower [B, B] is the factor's block on the diagonal; scale [R]; weight, sums, errors float32 and codes int8
        [B, R] are transposed. sums has lowerᵀ · error of the columns behind the panel, and gets the panel's own; errors
        and codes are results.
        """
        ...

    def descend(
        self, hessian: Tensor, inverse_diagonal: Tensor, bits: int, scale: Tensor, gradient: Tensor, codes: Tensor
    ) -> int:
        """One sweep over codes int8 [R, K], from the last column to the first, by their gradient [R, K]; both change.

        gradient = (w − scale · code) · hessian. Returns the number of changed codes.
        """
        ...


class TorchArithmetic:
    """The operators in torch, on one device. Products are the device's float32 ones."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)

    def product(self, a: Tensor, b: Tensor, out: Tensor | None = None, *, subtract: bool = False) -> Tensor:
        if out is None:
            return a @ b
        return out.addmm_(a, b, alpha=-1) if subtract else out.copy_(a @ b)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return (x.to(self.device) @ weight.to(self.device).T).cpu()

    def gptq_columns(
        self, lower: Tensor, bits: int, scale: Tensor, weight: Tensor, sums: Tensor, errors: Tensor, codes: Tensor
    ) -> None:
        bound = 2 ** (bits - 1)
        inverse, diagonal = scale.reciprocal(), lower.diagonal()
        for j in range(weight.shape[0] - 1, -1, -1):
            target = weight[j] + sums[j] / diagonal[j]
            code = (target * inverse).round_().clamp_(-bound, bound - 1)
            codes[j] = code.to(torch.int8)
            errors[j] = weight[j] - code * scale
            sums[: j + 1].addr_(lower[j, : j + 1], errors[j])

    def descend(
        self, hessian: Tensor, inverse_diagonal: Tensor, bits: int, scale: Tensor, gradient: Tensor, codes: Tensor
    ) -> int:
        bound, inverse = 2 ** (bits - 1), scale.reciprocal()
        before = codes.clone()
        for end in range(codes.shape[1], 0, -PANEL):
            start = max(0, end - PANEL)
            # Transposed: a column of all rows is contiguous.
            part, found = gradient[:, start:end].T.contiguous(), codes[:, start:end].T.to(torch.float32)
            changes = torch.empty_like(part)
            for j in range(end - start - 1, -1, -1):
                wanted = part[j] * inverse_diagonal[start + j] * inverse
                best = (found[j] + wanted).round_().clamp_(-bound, bound - 1)
                best = torch.where(wanted.abs() > 0.5, best, found[j])
                changes[j] = (found[j] - best) * scale
                found[j] = best
                part.addr_(hessian[start:end, start + j], changes[j])
            gradient[:, start:end], codes[:, start:end] = part.T, found.T.to(torch.int8)
            gradient[:, :start].addmm_(changes.T, hessian[start:end, :start])
            gradient[:, end:].addmm_(changes.T, hessian[start:end, end:])
        return int((codes != before).sum())
