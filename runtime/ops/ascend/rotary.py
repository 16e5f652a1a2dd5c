"""Rotary embedding on torch_npu."""

from __future__ import annotations

import torch
from torch import Tensor

from ..rotary import Rotary
from .device import Npu


class AscendRotary(Rotary):
    """Rotations by the NPU's operators."""

    def __init__(self, npu: Npu):
        self.npu = npu

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tables = (table[:, None, None] for table in (cos, sin))  # [T, 1, 1, D]: every token is a batch of its own
        rotated: Tensor = self.npu.operators.npu_interleave_rope(x.contiguous().unsqueeze(2), *tables)
        return rotated.squeeze(2)

    def rotary_mul(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.float()
        first, second = x.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
        return (x * cos[:, None].float() + across * sin[:, None].float()).to(self.npu.dtype)
