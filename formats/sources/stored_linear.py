"""The one reader of quantized linears: codes, scales and the scheme's other tensors, in every stored form.

Conversion takes their rows in the artifact's form, `verify` lists their problems, the runtime maps them. Tensors that
follow from others are computed and compared: a scale_bias or quant_bias that disagrees with its codes is damage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from ...deferred import torch
from ...errors import CheckpointError
from ...quant.stored_rows import StoredRows
from ..checkpoint import Checkpoint
from ..int4 import pack_int4, unpack_int4
from ..schemes import (
    BIAS,
    BIAS_COLUMNS,
    DEQ_SCALE,
    INPUT_OFFSET,
    INPUT_SCALE,
    OFFSET,
    QUANT_BIAS,
    SCALE,
    WEIGHT,
    QuantizedRows,
    Scheme,
    scale_bias,
)
from ..static_w8a8 import InputScale, input_scale_of, load_deq_scale, quant_bias, store_deq_scale

if TYPE_CHECKING:
    from torch import Tensor

# input_scale · weight_scale, where weight_scale may itself be a rounded quotient.
_DEQ_TOLERANCE: Final = 2.0**-22
# ModelSlim sums rounded float32 products where npuq sums integers, and rounds quant_bias through float32.
_BIAS_TOLERANCE: Final = 2.0**-20
_QUANT_BIAS_TOLERANCE: Final = 2.0**-22


class Codes(Enum):
    """The stored form of the codes of a matrix [N, K]."""

    INT8 = "int8 [N, K]"
    INT4_OUTPUTS = "int8 [N/2, K], two outputs a byte, as in an artifact"
    INT4_INPUTS = "int32 [N, K/8], eight inputs a word from the low nibble up, 8 added to each"
    INT4_BYTES = "int8 [N, K], each code in a byte of its own"


class Problem(NamedTuple):
    """A tensor (the suffix of its name), the fault of its values, and the remedy."""

    suffix: str
    what: str
    remedy: str = "the checkpoint is damaged: fetch it again"


@dataclass(frozen=True)
class LinearRows:
    """Rows of a quantized linear, unpacked: codes int8 [R, K], scale float32 [R, 1]; `beside` has the scheme's other
    tensors by suffix, as stored."""

    scheme: Scheme
    codes: Tensor
    scale: Tensor
    beside: Mapping[str, Tensor]

    def to_float32(self) -> Tensor:
        """Dequantize to float32 [R, K]."""
        return self.codes.to(torch.float32) * self.scale

    def problems(self, *, exact: bool) -> Iterator[Problem]:
        """Find impossible values, and values that disagree with each other.

        exact: sums must be npuq's exact integer sums; else they may be off by ModelSlim's rounding.
        """
        yield from self.code_problems()
        yield from self._bias_problems(exact)
        yield from self._static_problems(exact)

    def code_problems(self) -> Iterator[Problem]:
        """Find problems of codes and scales, the tensors that dequantization needs."""
        if OFFSET in self.beside and self.beside[OFFSET].count_nonzero():
            yield Problem(OFFSET, "is not zero: asymmetric codes are not read", "quantize symmetrically")
        if not are_positive(self.scale):
            source = DEQ_SCALE if SCALE not in self.beside else SCALE
            yield Problem(source, "holds a scale that is not a positive number")

    def _bias_problems(self, exact: bool) -> Iterator[Problem]:
        if BIAS not in self.beside:
            return
        stored = self.beside[BIAS].to(torch.float32)
        off = (stored - scale_bias(self.codes, self.scale, stored.shape[1])).abs()
        allowed = 0.0 if exact else _BIAS_TOLERANCE * scale_bias(self.codes.abs(), self.scale, stored.shape[1])
        # Here and below, comparisons are written so that NaN counts as wrong.
        if not (off <= allowed).all():
            yield Problem(BIAS, "disagrees with the stored codes: experts would compute garbage")

    def _static_problems(self, exact: bool) -> Iterator[Problem]:
        if self.scheme is not Scheme.W8A8_STATIC:
            return
        try:
            inputs = input_scale_of(self.beside)
        except ValueError as error:
            yield Problem(INPUT_SCALE, f"is unusable: {error}")
            return
        expected = inputs.scale * self.scale.flatten()
        deq_scale = load_deq_scale(self.beside[DEQ_SCALE]).flatten()
        if not ((deq_scale - expected).abs() <= _DEQ_TOLERANCE * expected).all():
            yield Problem(DEQ_SCALE, "is not input_scale · weight_scale: outputs would be scaled wrongly")
        bias = quant_bias(self.codes, inputs.offset)
        off = (self.beside[QUANT_BIAS].flatten().to(torch.int64) - bias).abs()
        if not (off <= (0 if exact else 1 + _QUANT_BIAS_TOLERANCE * bias.abs())).all():
            yield Problem(QUANT_BIAS, "disagrees with the stored codes and input_offset: outputs would be shifted")


@dataclass(frozen=True, slots=True)
class StoredLinear:
    """A quantized linear `P.weight` of shape [N, K]: a `Weight`, and the reader of its codes and scales.

    tensors: the stored tensors by suffix, `weight` (the codes) and the scheme's others.
    """

    checkpoint: Checkpoint
    name: str
    scheme: Scheme
    shape: tuple[int, int]
    codes: Codes
    tensors: Mapping[str, str]
    block_rows: ClassVar[int] = 1
    held_bytes: ClassVar[int] = 0

    @property
    def dtype(self) -> str:
        return self.scheme.value

    @property
    def float_code(self) -> str:
        return self.checkpoint.model_code

    @property
    def nbytes(self) -> int:
        return sum(self.checkpoint.tensors[name].nbytes for name in self.tensors.values())

    @property
    def stored_names(self) -> tuple[str, ...]:
        return tuple(self.tensors.values())

    @property
    def file(self) -> Path:
        return self.checkpoint.tensors[self.tensors[WEIGHT]].file

    @property
    def linear(self) -> StoredLinear:
        return self

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        """Read rows [start, stop), dequantized to float32."""
        rows = self._read(start, self.shape[0] if stop is None else stop, (SCALE, OFFSET))
        self._refuse(rows.code_problems())
        return StoredRows(rows.to_float32())

    def view(self) -> None:
        return None

    def row_bytes(self) -> None:
        return None

    def read(self, start: int, stop: int) -> LinearRows:
        """Read rows [start, stop) of all tensors; tensors without rows, such as input_scale, are whole.

        CheckpointError for 4-bit codes out of range, and for a static linear with neither weight_scale nor a usable
        input_scale.
        """
        return self._read(start, stop, tuple(self.tensors))

    def quantized_rows(self, start: int, stop: int, *, row_parallel: bool) -> QuantizedRows:
        """Read rows [start, stop) (an even number for W4A8) in the artifact's form, with a squared error of 0.

        Raises CheckpointError for impossible values, and for values that disagree with each other.
        """
        rows = self.read(start, stop)
        self._refuse(rows.problems(exact=False))
        codes, scale = rows.codes, rows.scale
        tensors = {WEIGHT: codes, SCALE: scale, OFFSET: torch.zeros_like(scale)}
        if self.scheme is Scheme.W4A8:
            tensors[WEIGHT] = pack_int4(codes)
            tensors[BIAS] = scale_bias(codes, scale, BIAS_COLUMNS if row_parallel else 1)
        elif self.scheme is Scheme.W8A8_STATIC:
            float16 = self.checkpoint.model_code == "F16"
            tensors |= _static_tensors(codes, input_scale_of(rows.beside), rows.beside[DEQ_SCALE], float16)
        squares = codes.to(torch.int32).square().sum(1, dtype=torch.int64) * scale.to(torch.float64).flatten().square()
        return QuantizedRows(tensors, torch.zeros_like(squares), squares)

    def input_scale(self) -> InputScale:
        """Read the input scale and offset of a static W8A8 linear. CheckpointError for unusable values."""
        read = self.checkpoint.read
        try:
            return input_scale_of({suffix: read(self.tensors[suffix]) for suffix in (INPUT_SCALE, INPUT_OFFSET)})
        except ValueError as error:
            raise self._error(Problem(INPUT_SCALE, f"is unusable: {error}")) from error

    def mapped_scale(self, suffix: str) -> Tensor:
        """Map a tensor of one scale a channel as float32 [N, 1]; a copy where it is stored in another form.

        CheckpointError for a scale that is not positive and finite.
        """
        stored = self.checkpoint.view(self.tensors[suffix])
        as_it_is = stored.dtype is torch.float32 and stored.dim() == 2
        scale = stored if as_it_is else load_deq_scale(stored).to(torch.float32).reshape(-1, 1)
        if not are_positive(scale):
            self.checkpoint.files.check()  # a file that was cut short reads as zeros
            raise self._error(Problem(suffix, "holds a scale that is not a positive number"))
        return scale

    def mapped(self, suffix: str) -> Tensor:
        """A stored tensor over a memory map."""
        return self.checkpoint.view(self.tensors[suffix])

    def _read(self, start: int, stop: int, suffixes: tuple[str, ...]) -> LinearRows:
        beside = {
            suffix: self._beside(suffix, start, stop)
            for suffix in suffixes
            if suffix != WEIGHT and suffix in self.tensors
        }
        if SCALE in beside:
            scale = beside[SCALE]
        else:  # ModelSlim's static linears keep only what is multiplied
            scale = load_deq_scale(self._beside(DEQ_SCALE, start, stop)) / self.input_scale().scale
        return LinearRows(self.scheme, self._codes(start, stop), scale.to(torch.float32).reshape(-1, 1), beside)

    def _beside(self, suffix: str, start: int, stop: int) -> Tensor:
        name = self.tensors[suffix]
        if suffix in (INPUT_SCALE, INPUT_OFFSET):
            return self.checkpoint.read(name)
        return self.checkpoint.read_rows(name, start, stop)

    def _codes(self, start: int, stop: int) -> Tensor:
        name = self.tensors[WEIGHT]
        if self.codes is Codes.INT4_OUTPUTS:
            first = start // 2
            pairs = unpack_int4(self.checkpoint.read_rows(name, first, -(-stop // 2)))
            return pairs[start - 2 * first : stop - 2 * first]
        codes = self.checkpoint.read_rows(name, start, stop)
        if self.codes is Codes.INT4_INPUTS:
            shifts = torch.arange(0, 32, 4, dtype=torch.int32)
            return ((codes[:, :, None] >> shifts & 15) - 8).to(torch.int8).flatten(1)
        if self.codes is Codes.INT4_BYTES and codes.numel() and not -8 <= int(codes.min()) <= int(codes.max()) <= 7:
            raise self._error(Problem(WEIGHT, "holds codes outside −8 to 7, but is described as 4-bit"))
        return codes

    def _refuse(self, problems: Iterator[Problem]) -> None:
        for problem in problems:
            raise self._error(problem)

    def _error(self, problem: Problem) -> CheckpointError:
        info = self.checkpoint.tensors[self.tensors[problem.suffix]]
        return CheckpointError(f"{info.file}: tensor {info.name!r} {problem.what}; {problem.remedy}")


def are_positive(scale: Tensor) -> bool:
    """True where all scales, of any float dtype, are positive and finite; also of an empty tensor."""
    if not scale.numel():
        return True
    low, high = scale.aminmax()
    # Written so that NaN counts as wrong.
    return 0 < float(low) <= float(high) < float("inf")


def _static_tensors(codes: Tensor, inputs: InputScale, deq_scale: Tensor, float16: bool) -> dict[str, Tensor]:
    """The tensors of a static linear beside codes and scale, with the stored deq_scale."""
    return {
        INPUT_SCALE: torch.tensor([inputs.scale], dtype=torch.float32),
        INPUT_OFFSET: torch.tensor([float(inputs.offset)]),
        DEQ_SCALE: store_deq_scale(load_deq_scale(deq_scale).flatten(), float16=float16),
        QUANT_BIAS: quant_bias(codes, inputs.offset),
    }
