"""Checkpoints whose linears another tool has quantized already: their codes and scales, whatever form they lie in.

Names in, the artifact's tensors out; or float32 rows, as of any checkpoint. What a stored tensor can be computed from
is computed and compared: a scale_bias or quant_bias that disagrees with its codes is damage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models.config import model_dtype
from .checkpoint import Checkpoint
from .dialects import BlockScale, StoredRows, Weight, WeightSource
from .int4 import pack_int4, unpack_int4
from .schemes import (
    BIAS,
    BIAS_COLUMNS,
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    OFFSET,
    QUANT_BIAS,
    SCALE,
    SUFFIXES,
    WEIGHT,
    QuantizedRows,
    Scheme,
    scale_bias,
)
from .static_w8a8 import InputScale, input_scale_of, load_deq_scale, quant_bias, store_deq_scale

# ModelSlim sums rounded float32 products where npuq sums integers, and rounds quant_bias through float32.
_BIAS_TOLERANCE: Final = 2.0**-20
_QUANT_BIAS_TOLERANCE: Final = 2.0**-22


class Codes(Enum):
    """How the codes of a matrix [N, K] lie in their tensor."""

    INT8 = "int8 [N, K]"
    INT4_OUTPUTS = "int8 [N/2, K], two outputs a byte, as in an artifact"
    INT4_INPUTS = "int32 [N, K/8], eight inputs a word from the low nibble up, 8 added to each"
    INT4_BYTES = "int8 [N, K], each code in a byte of its own"


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """One linear: its logical name `P.weight` and shape [N, K], and its tensors by the suffix that each has here."""

    name: str
    scheme: Scheme
    shape: tuple[int, int]
    codes: Codes
    tensors: Mapping[str, str]


class QuantizedSource(WeightSource):
    """The logical weights of a checkpoint with `linears` that are quantized; all its other tensors are float.

    Raises CheckpointError for a tensor that is neither. `ignored` tensors are read over.
    """

    def __init__(
        self, checkpoint: Checkpoint, linears: Mapping[str, StoredLinear], ignored: frozenset[str] = frozenset()
    ):
        self.checkpoint = checkpoint
        self.float_dtype = model_dtype(checkpoint.config)
        self.block_rows = 1
        self.linears = dict(linears)
        claimed = {name for linear in linears.values() for name in linear.tensors.values()} | ignored
        by_codes = {linear.tensors[WEIGHT]: linear for linear in linears.values()}
        self.weights = {}
        for name in checkpoint.tensors:
            if name in by_codes:
                self.weights[by_codes[name].name] = self._logical(by_codes[name])
            elif name not in claimed:
                self._refuse_orphan(name)
                self.weights[name] = self._weight(name)

    @property
    def schemes(self) -> dict[str, Scheme]:
        """The scheme of every logical weight."""
        return {name: self.linears[name].scheme if name in self.linears else Scheme.FLOAT for name in self.weights}

    def is_computed(self, name: str) -> bool:
        """As `WeightSource.is_computed`: quantized ones are."""
        return name in self.linears

    def block_scales(self, name: str) -> BlockScale | None:
        """As `WeightSource.block_scales`: there is no FP8 here."""
        return None

    def stored_rows(self, name: str, start: int = 0, stop: int | None = None) -> StoredRows:
        """Rows [start, stop): float ones as they are stored, quantized ones dequantized to float32."""
        linear = self.linears.get(name)
        if linear is None:
            return super().stored_rows(name, start, stop)
        codes, scale = self._codes_and_scale(linear, start, linear.shape[0] if stop is None else stop)
        return StoredRows(codes.to(torch.float32) * scale)

    def rows_float(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `WeightSource.rows_float`; a quantized weight becomes `float_dtype`, rounded once."""
        if name in self.linears:
            return self.rows_float32(name, start, stop).to(self.float_dtype)
        return super().rows_float(name, start, stop)

    def float_code(self, name: str) -> str:
        """As `WeightSource.float_code`. Quantized weights are not float: ValueError."""
        if name in self.linears:
            raise ValueError(f"{name} is quantized")
        return super().float_code(name)

    def quantized_rows(self, name: str, start: int, stop: int, *, row_parallel: bool) -> QuantizedRows:
        """Rows [start, stop) (an even number for W4A8) in the artifact's form, with no error against themselves.

        Raises CheckpointError for values that no such linear can have, and for those that disagree with each other.
        """
        linear = self.linears[name]
        codes, scale = self._codes_and_scale(linear, start, stop)
        tensors = {WEIGHT: codes, SCALE: scale, OFFSET: torch.zeros_like(scale)}
        if linear.scheme is Scheme.W4A8:
            self._check_bias(linear, codes, scale, start, stop)
            tensors[WEIGHT] = pack_int4(codes)
            tensors[BIAS] = scale_bias(codes, scale, BIAS_COLUMNS if row_parallel else 1)
        elif linear.scheme is Scheme.W8A8_STATIC:
            tensors |= self._static(linear, codes, scale, start, stop)
        squares = codes.to(torch.int32).square().sum(1, dtype=torch.int64) * scale.to(torch.float64).flatten().square()
        return QuantizedRows(tensors, torch.zeros_like(squares), squares)

    def input_scale(self, name: str) -> InputScale:
        """How a static W8A8 linear quantizes its activations. CheckpointError for values that cannot be meant."""
        tensors = {
            suffix: self.checkpoint.read(self.linears[name].tensors[suffix]) for suffix in (INPUT_SCALE, INPUT_OFFSET)
        }
        try:
            return input_scale_of(tensors)
        except ValueError as error:
            raise self._damaged(self.linears[name], INPUT_SCALE, str(error)) from error

    def stored_names(self, name: str) -> tuple[str, ...]:
        """As `WeightSource.stored_names`: codes, scales and what else a linear has."""
        linear = self.linears.get(name)
        return (name,) if linear is None else tuple(linear.tensors.values())

    def _logical(self, linear: StoredLinear) -> Weight:
        nbytes = sum(self.checkpoint.tensors[name].nbytes for name in linear.tensors.values())
        return Weight(linear.name, linear.shape, linear.scheme.value, nbytes)

    def _refuse_orphan(self, name: str) -> None:
        info = self.checkpoint.tensors[name]
        if name.rpartition(".")[2] in SUFFIXES:
            raise CheckpointError(f"{info.file}: tensor {name!r} belongs to no linear of its scheme; fetch it again")
        if info.dtype in ("I8", "I32"):
            raise CheckpointError(f"{info.file}: tensor {name!r} is {info.dtype}, but nothing says how it is quantized")

    def _codes_and_scale(self, linear: StoredLinear, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """int8 [R, K] and float32 [R, 1]."""
        codes = self._codes(linear, start, stop)
        read = self.checkpoint.read_rows
        if OFFSET in linear.tensors and read(linear.tensors[OFFSET], start, stop).count_nonzero():
            raise self._damaged(linear, OFFSET, "is not zero: asymmetric codes are not read; quantize symmetrically")
        if SCALE in linear.tensors:
            scale = read(linear.tensors[SCALE], start, stop).to(torch.float32).reshape(-1, 1)
            source = SCALE
        else:  # ModelSlim's static linears keep only what is multiplied
            deq_scale = load_deq_scale(read(linear.tensors[DEQ_SCALE], start, stop))
            scale = (deq_scale / self.input_scale(linear.name).scale).reshape(-1, 1)
            source = DEQ_SCALE
        if not (torch.isfinite(scale) & (scale > 0)).all():
            raise self._damaged(linear, source, "holds a scale that is not a positive number; fetch it again")
        return codes, scale

    def _codes(self, linear: StoredLinear, start: int, stop: int) -> Tensor:
        name = linear.tensors[WEIGHT]
        if linear.codes is Codes.INT4_OUTPUTS:
            first = start // 2
            return unpack_int4(self.checkpoint.read_rows(name, first, -(-stop // 2)))[
                start - 2 * first : stop - 2 * first
            ]
        codes = self.checkpoint.read_rows(name, start, stop)
        if linear.codes is Codes.INT4_INPUTS:
            shifts = torch.arange(0, 32, 4, dtype=torch.int32)
            return ((codes[:, :, None] >> shifts & 15) - 8).to(torch.int8).flatten(1)
        if linear.codes is Codes.INT4_BYTES and codes.numel() and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
            raise self._damaged(linear, WEIGHT, "holds codes outside −8 to 7, but is described as 4-bit")
        return codes

    def _check_bias(self, linear: StoredLinear, codes: Tensor, scale: Tensor, start: int, stop: int) -> None:
        if BIAS not in linear.tensors:
            return
        stored = self.checkpoint.read_rows(linear.tensors[BIAS], start, stop).to(torch.float32)
        columns = stored.shape[1]
        magnitude = scale_bias(codes.abs(), scale, columns)
        # Written so that NaN counts as wrong.
        if not ((stored - scale_bias(codes, scale, columns)).abs() <= _BIAS_TOLERANCE * magnitude).all():
            raise self._damaged(
                linear, BIAS, "disagrees with the stored codes; the checkpoint is damaged: fetch it again"
            )

    def _static(self, linear: StoredLinear, codes: Tensor, scale: Tensor, start: int, stop: int) -> dict[str, Tensor]:
        inputs = self.input_scale(linear.name)
        read = self.checkpoint.read_rows
        deq_scale = load_deq_scale(read(linear.tensors[DEQ_SCALE], start, stop))
        expected = inputs.scale * scale.flatten()
        if not ((deq_scale - expected).abs() <= _QUANT_BIAS_TOLERANCE * expected).all():
            raise self._damaged(linear, DEQ_SCALE, "is not input_scale · weight_scale; fetch the checkpoint again")
        bias = quant_bias(codes, inputs.offset)
        off = (read(linear.tensors[QUANT_BIAS], start, stop).to(torch.int64) - bias).abs()
        if not (off <= 1 + _QUANT_BIAS_TOLERANCE * bias.abs()).all():
            raise self._damaged(linear, QUANT_BIAS, "disagrees with the stored codes; fetch the checkpoint again")
        return {
            INPUT_SCALE: torch.tensor([inputs.scale], dtype=torch.float32),
            INPUT_OFFSET: torch.tensor([float(inputs.offset)]),
            DEQ_SCALE: store_deq_scale(deq_scale, float16=self.float_dtype is torch.float16),
            QUANT_BIAS: bias,
        }

    def _damaged(self, linear: StoredLinear, suffix: str, why: str) -> CheckpointError:
        info = self.checkpoint.tensors[linear.tensors[suffix]]
        return CheckpointError(f"{info.file}: tensor {info.name!r} {why}")
