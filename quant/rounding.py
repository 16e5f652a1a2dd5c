"""Codes of rows at given scales, and the exact sums that compare them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


def rounded(rows: Tensor, inverse: Tensor, bits: int) -> Tensor:
    """Round rows float32 [R, K] times the scales' inverse float32 [R] half to even, and clamp: codes float32 [R, K]."""
    bound = 2 ** (bits - 1)
    return torch.mul(rows, inverse[:, None]).round_().clamp_(-bound, bound - 1)


def code_sums(fixed: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Exact Σ w·q and Σ q², int64 [R], for int32 w below 2**24: all partial sums are below 2**53 and exact in
    float64."""
    real = codes.to(torch.float64)[:, :, None]
    a = torch.bmm(fixed.to(torch.float64)[:, None, :], real)
    b = torch.bmm(real.mT, real)
    return a.flatten().to(torch.int64), b.flatten().to(torch.int64)


def fixed_norm(fixed: Tensor) -> Tensor:
    """Σ w² of int32 [R, K], float64 [R]."""
    # 2**63, the largest possible sum, wraps to its negative.
    return (fixed.to(torch.int64) ** 2).sum(1).to(torch.float64).abs()
