"""Schemes of quantized linears: the tensors of each, their shapes, and their computation from rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from ..deferred import torch
from ..native import library as native
from ..native.quantization import MOST_COLUMNS
from ..quant.scales import Method, scale_rows
from ..quant.stored_rows import StoredRows
from .int4 import pack_int4, unpack_int4

if TYPE_CHECKING:
    from torch import Tensor

WEIGHT, SCALE, OFFSET, BIAS = "weight", "weight_scale", "weight_offset", "scale_bias"
# The further tensors of W8A8 with a static input scale (static_w8a8.py).
INPUT_SCALE, INPUT_OFFSET, DEQ_SCALE, QUANT_BIAS = "input_scale", "input_offset", "deq_scale", "quant_bias"
# Every tensor that some scheme stores beside `P.weight`.
SUFFIXES = (SCALE, OFFSET, BIAS, INPUT_SCALE, INPUT_OFFSET, DEQ_SCALE, QUANT_BIAS)

# A row-parallel linear (a down projection) is split along K over tensor-parallel ranks: its bias is stored as this
# many partial sums so that each rank can take its own.
BIAS_COLUMNS = 16


class Scheme(str, Enum):
    """The quantization of a linear, under its name in quant_model_description.json."""

    W4A8 = "W4A8_DYNAMIC"
    W8A8 = "W8A8_DYNAMIC"
    W8A8_STATIC = "W8A8"
    FLOAT = "FLOAT"

    @property
    def weight_bits(self) -> int:
        """4 or 8; ValueError for FLOAT, whose width is the source's."""
        bits = {Scheme.W4A8: 4, Scheme.W8A8: 8, Scheme.W8A8_STATIC: 8}.get(self)
        if bits is None:
            raise ValueError("a FLOAT linear has no code width")
        return bits


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the artifact: its full name, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedRows:
    """Consecutive rows of a quantized linear.

    tensors: the rows of weight, weight_scale, weight_offset and the scheme's other tensors, in the artifact's dtypes.
    squared_error, squared_norm: Σ (w − ŵ)² and Σ w², float64 [R], with the precision of `ScaledRows`.
    """

    tensors: Mapping[str, Tensor]
    squared_error: Tensor
    squared_norm: Tensor


def output_tensors(
    weight_name: str, scheme: Scheme, shape: tuple[int, ...], *, row_parallel: bool, float16: bool = False
) -> tuple[OutputTensor, ...]:
    """The tensors that a quantized linear of float shape [N, K] named `P.weight` becomes.

    float16: the model's dtype is float16. Raises ValueError with the reason for a shape that the scheme cannot hold.
    FLOAT is not handled here: its dtype is the source's.
    """
    prefix = weight_name.removesuffix(WEIGHT)
    more: tuple[OutputTensor, ...] = ()
    if len(shape) != 2:
        raise ValueError(f"{scheme.value} needs a matrix, not shape {list(shape)}")
    n, k = shape
    if scheme is Scheme.W8A8:
        weight = OutputTensor(weight_name, "I8", (n, k))
    elif scheme is Scheme.W8A8_STATIC:
        weight = OutputTensor(weight_name, "I8", (n, k))
        more = (
            OutputTensor(prefix + INPUT_SCALE, "F32", (1,)),
            OutputTensor(prefix + INPUT_OFFSET, "F32", (1,)),
            OutputTensor(prefix + DEQ_SCALE, "I64" if float16 else "F32", (n,)),
            OutputTensor(prefix + QUANT_BIAS, "I32", (n,)),
        )
    elif scheme is Scheme.W4A8:
        if n % 2:
            raise ValueError(f"{n} output features is odd: int4 rows are packed in pairs")
        if row_parallel and k % BIAS_COLUMNS:
            raise ValueError(f"{k} input features are not divisible by {BIAS_COLUMNS}, the partial sums of scale_bias")
        weight = OutputTensor(weight_name, "I8", (n // 2, k))
        more = (OutputTensor(prefix + BIAS, "F32", (n, BIAS_COLUMNS if row_parallel else 1)),)
    else:
        raise ValueError("a FLOAT linear is one tensor, its own")
    scale, offset = (OutputTensor(prefix + suffix, "F32", (n, 1)) for suffix in (SCALE, OFFSET))
    return (weight, scale, offset, *more)


def quantize_rows(rows: Tensor, scheme: Scheme, method: Method, *, row_parallel: bool) -> QuantizedRows:
    """Quantize float32 rows [R, K] (R even for W4A8). Each row is independent: chunking does not change a bit.

    Raises NonFiniteError for an infinity or NaN, ValueError for a scheme that weights alone do not determine: FLOAT,
    and static W8A8 (`static_w8a8.quantize_static`).
    """
    if scheme is Scheme.W8A8_STATIC:
        raise ValueError("static W8A8 needs the range of its activations")
    scaled = scale_rows(rows, scheme.weight_bits, method)
    tensors = linear_tensors(scaled.codes, scaled.scale, scheme, row_parallel=row_parallel)
    return QuantizedRows(tensors, scaled.squared_error, scaled.squared_norm)


def linear_tensors(codes: Tensor, scale: Tensor, scheme: Scheme, *, row_parallel: bool) -> dict[str, Tensor]:
    """The stored tensors of W8A8 or W4A8 rows by suffix, from codes int8 [R, K] (R even for W4A8) and scale float32
    [R]."""
    column = scale[:, None]
    tensors = {WEIGHT: codes, SCALE: column, OFFSET: torch.zeros_like(column)}
    if scheme is Scheme.W4A8:
        tensors[WEIGHT] = pack_int4(codes)
        tensors[BIAS] = scale_bias(codes, column, BIAS_COLUMNS if row_parallel else 1)
    return tensors


def quantize_stored(stored: StoredRows, scheme: Scheme, method: Method, *, row_parallel: bool) -> QuantizedRows:
    """Quantize stored rows, by the native kernels where they are built: the tensors of `quantize_rows`, bit for bit."""
    if not is_native(scheme, stored.columns):
        return quantize_rows(stored.to_float32(), scheme, method, row_parallel=row_parallel)
    from ..native.binding import quantize

    columns = BIAS_COLUMNS if row_parallel else 1
    done = quantize(stored, scheme.weight_bits, method is Method.MSE, columns)
    tensors = {WEIGHT: done.codes, SCALE: done.scale, OFFSET: torch.zeros_like(done.scale)}
    if done.bias is not None:
        tensors[BIAS] = done.bias
    return QuantizedRows(tensors, done.squared_error, done.squared_norm)


def is_native(scheme: Scheme, columns: int) -> bool:
    """True where the native kernels are built and quantize rows of this many columns."""
    return scheme is not Scheme.W8A8_STATIC and 0 < columns <= MOST_COLUMNS and native.library() is not None


def scale_bias(codes: Tensor, scale: Tensor, columns: int) -> Tensor:
    """8 · s · Σ q over `columns` equal slices of K: float32 [N, columns] of codes int8 [N, K] and scale float32 [N, 1].

    The NPU splits an int8 activation a into nibbles, a = 16·hi + (lo − 8) + 8, and multiplies hi and lo − 8 alone. The
    bias adds the product of the 8 (CANN's documentation of aclnnGroupedMatmulSwigluQuantWeightNZ).
    """
    slices = codes.reshape(codes.shape[0], columns, -1)
    # Exact in int32, and in float32 too: |8 · Σ q| ≤ 64 · K < 2**24 for K ≤ 2**18.
    return (8 * slices.sum(dim=2, dtype=torch.int32)).to(torch.float32) * scale


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Dequantize a linear's `weight` and `weight_scale` to float32 [N, K]."""
    weight = tensors[WEIGHT]
    codes = unpack_int4(weight) if scheme is Scheme.W4A8 else weight
    return codes.to(torch.float32) * tensors[SCALE]
