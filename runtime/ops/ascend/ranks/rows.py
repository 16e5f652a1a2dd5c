"""Rows of which a rank has some columns: their codes by the scale of the whole row, and their unscaled products."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ...handles import Quantized
from ..device import Npu

BESIDE = 16  # columns for the row's maximum: a whole block of the kernel's 32 bytes
SMALLEST = 2.0**-118  # of a row's maximum as a divisor: its 127th is a normal float32
ROWS = 0  # axis of npu_quantize


def maximum(x: Tensor) -> Tensor:
    """Greatest |x| of each row: `Norms.row_maximum`."""
    return x.abs().amax(-1).float().nan_to_num(nan=torch.inf, posinf=torch.inf)


def dynamic_quant_by(x: Tensor, largest: Tensor, npu: Npu) -> Quantized:
    """Quantize columns of rows as the whole rows are: `Norms.dynamic_quant_by`.

    The whole row's maximum stands beside the columns, so that the operator itself finds the scale.
    """
    beside = largest.to(x.dtype).unsqueeze(1).expand(-1, BESIDE)
    codes, scale = npu.operators.npu_dynamic_quant(torch.cat([x, beside], dim=1))
    return Quantized(codes[:, : x.shape[1]].contiguous(), scale)


def swiglu_quant_by(activated: Tensor, largest: Tensor, npu: Npu) -> Quantized:
    """Quantize columns of activated rows, float32, as the whole rows are: `Norms.swiglu_quant_by`."""
    scale = largest.clamp(min=SMALLEST) / 127
    return Quantized(npu.operators.npu_quantize(activated, scale, None, torch.qint8, ROWS, True), scale)


def integer_sums(codes: Tensor, weight: Tensor, npu: Npu) -> Tensor:
    """Multiply int8 `[rows, K]` by int8 `[K, N]` → int32 `[rows, N]`, unscaled.

    The scale is 1: the documentation multiplies by it, engines rely on it being left out.
    """
    scale = _ones(weight.shape[1], weight.device)
    sums: Tensor = npu.operators.npu_quant_matmul(codes, weight, scale, output_dtype=torch.int32)
    return sums


@lru_cache(maxsize=16)
def _ones(count: int, device: torch.device) -> Tensor:
    return torch.ones(count, device=device)
