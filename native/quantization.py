"""The native kernels of conversion, on numpy arrays: stored rows are quantized, decoded, or compared with their codes.

Needs no torch. `binding.quantize` is the same for tensors, and torch computes the same numbers without the kernels
(`formats/schemes.py`).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..dtypes import ITEM_BYTES, array_dtype
from ..quant.scales import NonFiniteError
from .integers import checked
from .library import Source, call, description, level_index, library
from .pointers import array_address

if TYPE_CHECKING:
    from numpy.typing import NDArray

# The dtypes of stored rows, under the codes of safetensors. U8: int4, two inputs a byte (`StoredRows`).
NUMBERS: Final = {"F32": 0, "BF16": 1, "F16": 2, "F8_E4M3": 3, "U8": 6}
# The widest row that `quantize_rows` takes: its sums are exact up to here.
MOST_COLUMNS: Final = 1 << 17
MOST_BIAS_COLUMNS: Final = 16
# The dtypes that `decode_rows` makes.
DECODED: Final = ("F32", "BF16")

NO_MEMORY, NOT_FINITE, BAD_SIZE, BAD_INDEX = 1, 2, 3, 4


@dataclass(frozen=True)
class SourceRows:
    """Stored rows in memory: uint8 [R, bytes of a row] of a dtype of NUMBERS.

    scale: of FP8 and int4 the scales float32 [row blocks, column blocks], one for each `block` (rows, columns); row 0
    is row `first_row` of its block.
    """

    memory: NDArray[np.uint8]
    dtype: str
    scale: NDArray[np.float32] | None = None
    block: tuple[int, int] = (1, 1)
    first_row: int = 0

    @property
    def columns(self) -> int:
        """Values of a row."""
        width = self.memory.shape[1]
        return 2 * width if self.dtype == "U8" else width // ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class NativeRows:
    """Quantized rows: codes int8 [R, K], or for 4 bits packed [R / 2, K] with bias float32 [R, columns]; scale float32
    [R, 1]; squared_error and squared_norm float64 [R]."""

    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    squared_error: NDArray[np.float64]
    squared_norm: NDArray[np.float64]


class Quantizer:
    """Quantizes a weight piece by piece, with all addresses computed once.

    stored: `memory` is a buffer that the caller fills for each piece, `scale` has the scales from the weight's first
    row on. out: results of all the weight's rows, but possibly fewer rows of codes. All are contiguous.

    Raises ValueError for arrays that do not fit, RuntimeError without the native library.
    """

    def __init__(self, stored: SourceRows, bits: int, mse: bool, out: NativeRows, level: str | None = None):
        name = "quantize_rows"
        self._library = _library()
        self._level = -1 if level is None else level_index(self._library, level)
        self._source = _source(name, stored)
        self._memory_rows, self._columns = stored.memory.shape[0], stored.columns
        self._bits, self._mse, self._packed = bits, mse, 2 if bits == 4 else 1
        rows, self._code_rows = out.scale.shape[0], out.codes.shape[0]
        self._rows = _rows_with_scales(name, stored, rows)
        self._codes = array_address(out.codes, name, "codes", np.int8, self._code_rows, self._columns)
        self._scale = array_address(out.scale, name, "scale", np.float32, rows, 1)
        self._bias, self._bias_columns = None, 0
        if out.bias is not None:
            self._bias_columns = out.bias.shape[-1]
            self._bias = array_address(out.bias, name, "bias", np.float32, rows, self._bias_columns)
        self._error = array_address(out.squared_error, name, "squared_error", np.float64, rows)
        self._norm = array_address(out.squared_norm, name, "squared_norm", np.float64, rows)
        self._kept = stored, out

    def run(self, start: int, count: int, code_row: int) -> None:
        """Quantize the buffer's first `count` rows, which are the weight's rows from `start` on.

        Codes go to rows from `code_row` on. Raises NonFiniteError, and ValueError for rows out of range.
        """
        if (
            not 0 <= count <= self._memory_rows
            or not 0 <= start <= self._rows - count
            or not 0 <= code_row <= self._code_rows - count // self._packed
        ):
            raise ValueError(
                f"quantize_rows: rows {start} to {start + count}, codes from row {code_row} on: memory has "
                f"{self._memory_rows} rows, the weight {self._rows}, its codes {self._code_rows}"
            )
        self._source.first_row = self._kept[0].first_row + start
        bad_row = c_int64()
        status = call(
            self._library,
            "quantize_rows",
            self._level,
            ctypes.byref(self._source),
            count,
            self._columns,
            self._bits,
            self._mse,
            self._bias_columns,
            self._codes + code_row * self._columns,
            self._scale + 4 * start,
            None if self._bias is None else self._bias + 4 * self._bias_columns * start,
            self._error + 8 * start,
            self._norm + 8 * start,
            ctypes.byref(bad_row),
        )
        if status == NOT_FINITE:
            raise NonFiniteError(bad_row.value)
        if status:
            raise failure("quantize_rows", status)


def decode_rows(stored: SourceRows, dtype: str, out: NDArray[Any] | None, level: str | None = None) -> None:
    """Decode stored rows [R, K] to `out` [R, K], an array with the bits of F32 or BF16 (`dtypes.array_dtype`).

    Each value is rounded once; without `out` they are only looked at. The numbers are those of `StoredRows.to`. Raises
    NonFiniteError for an infinity or NaN, stored or in `dtype`.
    """
    name, found, rows, columns = "decode_rows", _library(), stored.memory.shape[0], stored.columns
    source, bad_row = _source(name, stored), c_int64()
    status = call(
        found,
        name,
        -1 if level is None else level_index(found, level),
        ctypes.byref(source),
        _rows_with_scales(name, stored, rows),
        columns,
        NUMBERS[dtype],
        None if out is None else array_address(out, name, "out", array_dtype(dtype).type, rows, columns),
        ctypes.byref(bad_row),
    )
    if status == NOT_FINITE:
        raise NonFiniteError(bad_row.value)
    if status:
        raise failure(name, status)


def are_finite(memory: NDArray[np.uint8], dtype: str) -> bool:
    """True where contiguous bytes hold no infinity or NaN of a float dtype."""
    width = MOST_COLUMNS * ITEM_BYTES[dtype]
    whole = len(memory) // width * width
    try:
        for part in (memory[:whole].reshape(-1, width), memory[whole:].reshape(1, -1)):
            if part.size:
                decode_rows(SourceRows(part, dtype), "F32", None)
    except NonFiniteError:
        return False
    return True


@dataclass(frozen=True)
class Compared:
    """Sums of rows of codes: `sums` int32 [R, columns] over equal slices of each row; Σ (w − ŵ)² and Σ w² float64 [R]
    against the rows of the source, where those were given."""

    sums: NDArray[np.int32]
    squared_error: NDArray[np.float64]
    squared_norm: NDArray[np.float64]


def compare_rows(
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    bits: int,
    sum_columns: int,
    stored: SourceRows | None,
    level: str | None = None,
) -> Compared:
    """Compare codes int8 [R, K], for 4 bits packed [R / 2, K], times their scale float32 [R] with the stored rows.

    sum_columns: at most MOST_BIAS_COLUMNS; 0 for no sums. Infinities and NaN pass through.
    """
    name, found, rows, columns = "compare_rows", _library(), scale.shape[0], codes.shape[1]
    if stored is not None and (stored.memory.shape[0], stored.columns) != (rows, columns):
        raise ValueError(f"{name}: {rows}x{columns} codes, and {stored.memory.shape[0]}x{stored.columns} stored values")
    source = None if stored is None else _source(name, stored)
    if stored is not None:
        _rows_with_scales(name, stored, rows)
    if not 0 <= sum_columns <= MOST_BIAS_COLUMNS:
        raise ValueError(f"{name}: {sum_columns} sums a row; there are up to {MOST_BIAS_COLUMNS}")
    result = Compared(np.zeros((rows, sum_columns), np.int32), np.zeros(rows), np.zeros(rows))
    status = call(
        found,
        name,
        -1 if level is None else level_index(found, level),
        None if source is None else ctypes.byref(source),
        array_address(codes, name, "codes", np.int8, rows // 2 if bits == 4 else rows, columns),
        array_address(scale, name, "scale", np.float32, rows),
        rows,
        columns,
        bits,
        sum_columns,
        result.sums.ctypes.data,
        result.squared_error.ctypes.data,
        result.squared_norm.ctypes.data,
    )
    if status:
        raise failure(name, status)
    return result


def failure(name: str, status: int) -> Exception:
    """The error for a status of a native call."""
    if status == BAD_SIZE:
        return ValueError(f"{name}: the native kernel refuses a dtype, or sizes that do not fit each other")
    if status == NOT_FINITE:
        return ValueError(f"{name}: the numbers are not finite")
    if status == BAD_INDEX:
        return ValueError(f"{name}: the native kernel refuses an index or a length beyond what it points into")
    return MemoryError(f"{name}: no memory for the native kernel's scratch")


def _library() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError(description())
    return found


def _source(operator: str, stored: SourceRows) -> Source:
    memory, dtype, scale = stored.memory, stored.dtype, stored.scale
    if dtype not in NUMBERS:
        raise ValueError(f"{operator}: rows of {dtype}; the native kernel takes {', '.join(NUMBERS)}")
    if memory.shape[1] * (2 if dtype == "U8" else 1) != stored.columns * (1 if dtype == "U8" else ITEM_BYTES[dtype]):
        raise ValueError(f"{operator}: rows of {memory.shape[1]} bytes are no whole number of {dtype}")
    data = array_address(memory, operator, "rows", np.uint8, *memory.shape)
    if scale is None:
        return Source(data, None, 0, 0, 1, max(1, stored.columns), NUMBERS[dtype])
    block_rows, block_columns = (checked(size, c_int32, operator, "block size") for size in stored.block)
    if block_rows < 1 or block_columns < 1:
        raise ValueError(f"{operator}: blocks of {block_rows}x{block_columns}")
    column_blocks = -(-stored.columns // block_columns)
    address = array_address(scale, operator, "block scale", np.float32, scale.shape[0], column_blocks)
    return Source(data, address, column_blocks, stored.first_row, block_rows, block_columns, NUMBERS[dtype])


def _rows_with_scales(operator: str, stored: SourceRows, rows: int) -> int:
    """The number of the weight's rows. Raises ValueError where a row has no block scale."""
    if stored.scale is not None:
        count, first, block_rows = stored.scale.shape[0], stored.first_row, stored.block[0]
        if first < 0 or count * block_rows - first < rows:
            raise ValueError(
                f"{operator}: {rows} rows from row {first} of a block on; there are scales of {count} blocks of "
                f"{block_rows} rows"
            )
    return rows
