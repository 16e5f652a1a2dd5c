"""Norms, activation functions and quantization on torch_npu."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..handles import Quantized
from ..norms import Norms
from .device import Npu
from .ranks import rows

MAX_SWIGLU_WIDTH = 8192
"""Outputs of `npu_dequant_swiglu_quant`. Dense layers have up to 18,432."""


class AscendNorms(Norms):
    """Operators on rows, by torch_npu."""

    def __init__(self, npu: Npu):
        self.npu = npu

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return F.embedding(token_ids, table).to(self.npu.dtype)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        normed: Tensor = self.npu.operators.npu_rms_norm(x, gamma, epsilon=eps)[0]
        return normed

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        normed, _, total = self.npu.operators.npu_add_rms_norm(x, residual, gamma, epsilon=eps)
        return normed, total

    def layer_norm(self, x: Tensor, gamma: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x.float(), gamma.shape, gamma, bias, eps).to(self.npu.dtype)

    def swiglu(self, x: Tensor) -> Tensor:
        activated: Tensor = self.npu.operators.npu_swiglu(x, dim=-1)
        return activated

    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        if smooth is None:
            return Quantized(*self.npu.operators.npu_dynamic_quant(x))
        return Quantized(*self.npu.operators.npu_dynamic_quant(x, smooth_scales=smooth))

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        if x.shape[-1] > 2 * MAX_SWIGLU_WIDTH:
            return self.dynamic_quant(self.swiglu(x))  # rounds to the compute dtype on the way
        # Both defaults are wrong here: they activate the right half and quantize statically.
        return Quantized(*self.npu.operators.npu_dequant_swiglu_quant(x, activate_left=True, quant_mode=1))

    def row_maximum(self, x: Tensor) -> Tensor:
        return rows.maximum(x)

    def dynamic_quant_by(self, x: Tensor, largest: Tensor) -> Quantized:
        return rows.dynamic_quant_by(x, largest, self.npu)

    def swiglu_float32(self, x: Tensor) -> Tensor:
        return self.swiglu(x.float())

    def swiglu_quant_by(self, activated: Tensor, largest: Tensor) -> Quantized:
        return rows.swiglu_quant_by(activated, largest, self.npu)
