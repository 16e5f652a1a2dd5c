"""W8A8 with a static input scale: one scale and offset for all activations of a linear, from a calibrated range.

ModelSlim's `W8A8`. Weights are those of W8A8_DYNAMIC. An activation becomes a = clamp(round(x / input_scale +
input_offset)), and the product is (Σ q·a + quant_bias) · deq_scale, where quant_bias takes the offset's part out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ..deferred import torch
from ..quant.scales import Method
from .schemes import (
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    OFFSET,
    QUANT_BIAS,
    SCALE,
    WEIGHT,
    QuantizedRows,
    Scheme,
    quantize_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

# ModelSlim's floor: a range of zeros still needs a scale whose inverse is finite.
_LEAST_SCALE: Final = 2.0**-23


@dataclass(frozen=True)
class InputScale:
    """The static quantization of a linear's activations to int8: clamp(round(x / scale + offset), −128, 127).

    offset: a whole number in [−128, 127]. The linears of a fused group (q_a and kv_a, gate and up) must share scale and
    offset: their common input is quantized once.
    """

    scale: float
    offset: int

    @classmethod
    def of_range(cls, low: float, high: float) -> InputScale:
        """The finest grid of 256 steps that holds zero and [low, high], the least and greatest activation seen.

        `scale` is rounded up to bfloat16, because vLLM-Ascend and SGLang keep it in the model's dtype: they then
        compute with the scale that deq_scale was computed from. Raises ValueError for an infinity, NaN or an empty
        range.
        """
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"activations between {low} and {high} give no input scale")
        low, high = min(low, 0.0), max(high, 0.0)
        scale = _round_up_to_bfloat16(max((high - low) / 255, _LEAST_SCALE))
        return cls(scale, max(-128, min(127, round(-low / scale) - 128)))


def quantize_static(weight: Tensor, low: float, high: float, method: Method, *, float16: bool = False) -> QuantizedRows:
    """Quantize a weight float32 [N, K] to static W8A8, for activations between `low` and `high`.

    Returns, by suffix: weight int8 [N, K], weight_scale and weight_offset float32 [N, 1], input_scale and input_offset
    float32 [1], deq_scale float32 [N] (int64 in a `float16` model), quant_bias int32 [N]. Codes and errors are those of
    W8A8_DYNAMIC by the same method. The linears of a fused group need the range of their common input. `static_tensors`
    takes codes of other methods.

    Raises NonFiniteError for a weight that holds an infinity or NaN, ValueError for a range that gives no scale.
    """
    inputs = InputScale.of_range(low, high)
    rows = quantize_rows(weight, Scheme.W8A8, method, row_parallel=False)
    tensors = static_tensors(rows.tensors[WEIGHT], rows.tensors[SCALE], inputs, float16=float16)
    return QuantizedRows(tensors, rows.squared_error, rows.squared_norm)


def static_tensors(codes: Tensor, scale: Tensor, inputs: InputScale, *, float16: bool = False) -> dict[str, Tensor]:
    """The tensors of a W8A8 linear by suffix, from codes int8 [N, K] and weight_scale float32 [N, 1].

    deq_scale is float32 [N], or its bit pattern in int64 for a float16 model: CANN's matmul takes one dtype for each.
    """
    input_scale = torch.tensor([inputs.scale], dtype=torch.float32)
    return {
        WEIGHT: codes,
        SCALE: scale,
        OFFSET: torch.zeros_like(scale),
        INPUT_SCALE: input_scale,
        INPUT_OFFSET: torch.tensor([float(inputs.offset)]),
        DEQ_SCALE: store_deq_scale(input_scale * scale.flatten(), float16=float16),
        QUANT_BIAS: quant_bias(codes, inputs.offset),
    }


def quant_bias(codes: Tensor, offset: int) -> Tensor:
    """−offset · Σ_k q: int32 [N] of codes int8 [N, K], exact for K up to 2**17."""
    return (-offset * codes.sum(dim=1, dtype=torch.int64)).to(torch.int32)


def store_deq_scale(scale: Tensor, *, float16: bool) -> Tensor:
    """Encode deq_scale float32 [N] for storage: unchanged, or for a float16 model int64 with the bits in the low
    word."""
    return scale.view(torch.int32).to(torch.int64) if float16 else scale


def load_deq_scale(stored: Tensor) -> Tensor:
    """Decode a stored deq_scale of either form to float32 [N]; the inverse of `store_deq_scale`."""
    return stored.to(torch.int32).view(torch.float32) if stored.dtype == torch.int64 else stored


def input_scale_of(tensors: Mapping[str, Tensor]) -> InputScale:
    """Read `input_scale` and `input_offset` of a stored linear. ValueError, with the reason, for impossible values."""
    scale, offset = float(tensors[INPUT_SCALE]), float(tensors[INPUT_OFFSET])
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"input_scale {scale} is not a positive number")
    if offset != offset or offset != round(offset) or not -128 <= offset <= 127:
        raise ValueError(f"input_offset {offset} is not a whole number between -128 and 127")
    return InputScale(scale, int(offset))


def _round_up_to_bfloat16(value: float) -> float:
    """The least bfloat16 that is not below a positive number."""
    bits = int(torch.tensor(value, dtype=torch.float32).view(torch.int32))
    if float(torch.tensor(bits, dtype=torch.int32).view(torch.float32)) < value:
        bits += 1  # float32 itself rounded down
    bits = (bits + 0xFFFF) & ~0xFFFF
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))
