"""Norms, activation functions and quantization in plain torch.

Rounding rules are those of the NPU operators' kernels; the three quantizers differ on purpose (half-even of x·(127/m),
half-away of x/(m/127), half-even of y/(m/127)).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..handles import Quantized
from ..norms import Norms


class ReferenceNorms(Norms):
    """Operators on rows in plain torch. dtype: the compute dtype."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def embedding(self, token_ids: Tensor, table: Tensor) -> Tensor:
        return table[token_ids].to(self.dtype)

    def rms_norm(self, x: Tensor, gamma: Tensor, eps: float) -> Tensor:
        return (_normalise(x.float(), eps) * gamma.float()).to(self.dtype)

    def add_rms_norm(self, x: Tensor, residual: Tensor, gamma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x.float() + residual.float()
        rounded = _normalise(total, eps).to(self.dtype).float()
        return (rounded * gamma.float()).to(self.dtype), total.to(self.dtype)

    def layer_norm(self, x: Tensor, gamma: Tensor, bias: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x.float(), gamma.shape, gamma, bias, eps).to(self.dtype)

    def swiglu(self, x: Tensor) -> Tensor:
        return _swiglu(x.float()).to(self.dtype)

    def dynamic_quant(self, x: Tensor, smooth: Tensor | None = None) -> Quantized:
        values = x.float() if smooth is None else x.float() * smooth.float()
        return self.dynamic_quant_by(values, self.row_maximum(values))

    def dynamic_quant_by(self, x: Tensor, largest: Tensor) -> Quantized:
        values, largest = x.float(), largest.masked_fill(largest.isinf(), torch.nan)
        # A tensor over a tensor: torch computes a number over a tensor as the number times its reciprocal.
        factor = torch.full_like(largest, 127.0) / largest
        zero = factor.isinf()
        codes = (values * factor.masked_fill(zero, 0.0)[:, None]).round().nan_to_num(0.0).to(torch.int8)
        return Quantized(codes, factor.reciprocal().masked_fill(zero, 0.0))

    def dequant_swiglu_quant(self, x: Tensor) -> Quantized:
        activated = self.swiglu_float32(x)
        return self.swiglu_quant_by(activated, self.row_maximum(activated))

    def row_maximum(self, x: Tensor) -> Tensor:
        largest = x.float().abs().amax(-1)
        return largest.masked_fill(largest.isnan(), torch.inf)

    def swiglu_float32(self, x: Tensor) -> Tensor:
        return _swiglu(x.float())

    def swiglu_quant_by(self, activated: Tensor, largest: Tensor) -> Quantized:
        scale = largest.masked_fill(largest.isinf(), torch.nan) / 127.0
        return Quantized((activated / nonzero(scale)).round().nan_to_num(0.0).to(torch.int8), scale)


def row_maximum(values: Tensor) -> Tensor:
    """Greatest |value| of each row; NaN for a row with a NaN or an infinity.

    Such a row gets codes 0 and the scale NaN: results that depend on it are NaN and no plausible numbers.
    """
    largest = values.abs().amax(-1)
    return largest.masked_fill(largest.isinf(), torch.nan)


def nonzero(scale: Tensor) -> Tensor:
    """The scale as a divisor `[rows, 1]`: 1 for a scale of 0, of a row of zeros."""
    return scale.masked_fill(scale == 0, 1.0)[:, None]


def _normalise(x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    # Not F.silu: its last bit depends on a number's place in the tensor, which differs where ranks divide the columns.
    return gate / (1.0 + torch.exp(-gate)) * up
