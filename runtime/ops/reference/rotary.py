"""Rotary embedding in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotary import Rotary


class ReferenceRotary(Rotary):
    """Rotations in float32, rounded once. dtype: the compute dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        even, odd = x[..., 0::2], x[..., 1::2]
        straight, across = torch.cat([even, odd], dim=-1), torch.cat([-odd, even], dim=-1)
        return (straight * cos[:, None].float() + across * sin[:, None].float()).to(self.dtype)

    def rotary_mul(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        first, second = x.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
        return (x * cos[:, None].float() + across * sin[:, None].float()).to(self.dtype)
