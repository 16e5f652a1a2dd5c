"""Rotary embedding on torch_npu."""

from __future__ import annotations

from torch import Tensor

from ...rotary import Rotary
from ..device import Npu


class AscendRotary(Rotary):
    """Rotations by the NPU's operators."""

    def __init__(self, npu: Npu):
        self.npu = npu

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tables = (table[:, None, None] for table in (cos, sin))  # [T, 1, 1, D]: every token is a batch of its own
        rotated: Tensor = self.npu.operators.npu_interleave_rope(x.contiguous().unsqueeze(2), *tables)
        return rotated.squeeze(2)

    def rotary_mul(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # One batch: the operator takes fewer than 1000 of them.
        tables = (table[None, :, None] for table in (cos, sin))  # [1, T, 1, D]
        rotated: Tensor = self.npu.operators.npu_rotary_mul(x.contiguous().unsqueeze(0), *tables, rotary_mode="half")
        return rotated.squeeze(0)
