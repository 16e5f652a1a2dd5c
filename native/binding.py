"""The native kernels on torch tensors: quantization of stored rows, and the runtime's pool of threads.

torch computes the same integers (`schemes.quantize_rows`, `runtime/ops/reference/`).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_int64
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from ..quant.scales import NonFiniteError
from ..quant.stored_rows import StoredRows
from .integers import checked
from .library import (
    Draw,
    GqaBlock,
    Heads,
    KvCache,
    LatentCache,
    MlaBlock,
    MoeBlock,
    Pages,
    Part,
    Source,
    Strided,
    Weights,
    call,
    description,
    level_index,
    levels,
    library,
    new_pool,
)
from .pointers import address

__all__ = [
    "DTYPES",
    "INT4",
    "LAYOUTS",
    "MOST_BIAS_COLUMNS",
    "MOST_COLUMNS",
    "Draw",
    "GqaBlock",
    "Heads",
    "KvCache",
    "LatentCache",
    "MlaBlock",
    "MoeBlock",
    "NativeRows",
    "Pages",
    "Part",
    "Pool",
    "Quantizer",
    "Strided",
    "Weights",
    "description",
    "levels",
    "library",
    "quantize",
]

DTYPES: Final = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float8_e4m3fn: 3,
    torch.int8: 4,
    torch.uint8: 6,  # int4, two inputs a byte (`StoredRows`)
}
INT4: Final = 5
# Stored rows (`StoredRows`): where int8 is FP4, two inputs a byte.
ROW_DTYPES: Final = {**DTYPES, torch.int8: 7}
LAYOUTS: Final = {"nz": 0, "nd": 1}
# The widest row that `quantize` takes: its sums are exact up to here.
MOST_COLUMNS: Final = 1 << 17
MOST_BIAS_COLUMNS: Final = 16


_NO_MEMORY, _NOT_FINITE, _BAD_SIZE, _BAD_INDEX = 1, 2, 3, 4


@dataclass(frozen=True)
class NativeRows:
    """Rows quantized by `quantize`: codes int8 [R, K], or for 4 bits packed [R / 2, K] with bias float32 [R, columns];
    scale float32 [R, 1]; squared_error and squared_norm float64 [R]."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    squared_error: Tensor
    squared_norm: Tensor


def quantize(
    stored: StoredRows,
    bits: int,
    mse: bool,
    bias_columns: int,
    level: str | None = None,
) -> NativeRows:
    """Quantize stored rows [R, K] in one pass, on the calling thread.

    R is even for 4 bits; K at most 2**17. The results equal those of `schemes.quantize_rows` on the decoded rows, bit
    for bit. Raises NonFiniteError, and RuntimeError without the native library.
    """
    count, columns, packed = stored.rows.shape[0], stored.columns, bits == 4
    out = NativeRows(
        torch.empty(count // 2 if packed else count, columns, dtype=torch.int8),
        torch.empty(count, 1),
        torch.empty(count, bias_columns) if packed else None,
        torch.empty(count, dtype=torch.float64),
        torch.empty(count, dtype=torch.float64),
    )
    Quantizer(StoredRows(stored.rows.contiguous(), stored.blocks), bits, mse, out, level).run(0, count, 0)
    return out


class Quantizer:
    """Quantizes a weight piece by piece, as `quantize`, with all addresses computed once.

    stored: `rows` [R, K] is a buffer that the caller fills for each piece, `blocks` has the scales from the weight's
    first row on. out: results of all the weight's rows, but possibly fewer rows of codes. All are contiguous.
    """

    def __init__(self, stored: StoredRows, bits: int, mse: bool, out: NativeRows, level: str | None = None):
        found = library()
        if found is None:
            raise RuntimeError(description())
        self._library = found
        self._level = -1 if level is None else level_index(found, level)
        self._source = _source(stored)
        self._first_row = self._source.first_row
        self._memory_rows, self._columns = stored.rows.shape[0], stored.columns
        self._bits, self._mse, self._packed = bits, mse, 2 if bits == 4 else 1
        self._rows, self._code_rows = _rows_with_scales(stored, out), out.codes.shape[0]
        self._codes = _address(out.codes, "codes", torch.int8, self._code_rows, self._columns)
        rows = out.scale.shape[0]
        self._scale = _address(out.scale, "scale", torch.float32, rows, 1)
        self._bias, self._bias_columns = None, 0
        if out.bias is not None:
            self._bias_columns = out.bias.shape[-1]
            self._bias = _address(out.bias, "bias", torch.float32, rows, self._bias_columns)
        self._error = _address(out.squared_error, "squared_error", torch.float64, rows)
        self._norm = _address(out.squared_norm, "squared_norm", torch.float64, rows)
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
        self._source.first_row = self._first_row + start
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
        if status == _NOT_FINITE:
            raise NonFiniteError(bad_row.value)
        if status:
            raise failure("quantize_rows", status)


def _address(x: Tensor, name: str, dtype: torch.dtype, *shape: int) -> int:
    return address(x, "quantize_rows", name, dtype, *shape)


def _source(stored: StoredRows) -> Source:
    rows, blocks, dtype = stored.rows, stored.blocks, stored.rows.dtype
    if dtype not in ROW_DTYPES:
        raise ValueError(f"quantize_rows: rows of {dtype}; the native kernel takes {', '.join(map(str, ROW_DTYPES))}")
    data = _address(rows, "rows", dtype, *rows.shape)
    if blocks is None:
        return Source(data, None, 0, 0, 1, max(1, rows.shape[1]), ROW_DTYPES[dtype])
    block_rows, block_columns = (
        checked(size, c_int32, "quantize_rows", "block size") for size in (blocks.block_rows, blocks.block_columns)
    )
    if block_rows < 1 or block_columns < 1:
        raise ValueError(f"quantize_rows: blocks of {block_rows}x{block_columns}")
    column_blocks = -(-stored.columns // block_columns)
    scale = _address(blocks.scale, "block scale", torch.float32, blocks.scale.shape[0], column_blocks)
    return Source(data, scale, column_blocks, blocks.first_row, block_rows, block_columns, ROW_DTYPES[dtype])


def _rows_with_scales(stored: StoredRows, out: NativeRows) -> int:
    """The number of the weight's rows. Raises ValueError where a row has no block scale."""
    rows, blocks = out.scale.shape[0], stored.blocks
    if blocks is not None:
        count, first = blocks.scale.shape[0], blocks.first_row
        if first < 0 or count * blocks.block_rows - first < rows:
            raise ValueError(
                f"quantize_rows: {rows} rows from row {first} of a block on; there are scales of {count} blocks of "
                f"{blocks.block_rows} rows"
            )
    return rows


def failure(name: str, status: int) -> Exception:
    """The error for a status of a native call."""
    if status == _BAD_SIZE:
        return ValueError(f"{name}: the native kernel refuses a dtype, or sizes that do not fit each other")
    if status == _NOT_FINITE:
        return ValueError(f"{name}: the numbers are not finite")
    if status == _BAD_INDEX:
        return ValueError(f"{name}: the native kernel refuses an index or a length beyond what it points into")
    return MemoryError(f"{name}: no memory for the native kernel's scratch")


class Pool:
    """Threads that share the work of one call at a time; calls from several Python threads take turns.

    threads: the number of threads, the caller's included; None for torch's own, which follows OMP_NUM_THREADS.
    level: an instruction-set level by name; None for the best. Raises RuntimeError without the native library, and for
    a level that this CPU lacks.
    """

    def __init__(self, threads: int | None = None, level: str | None = None):
        found = library()
        if found is None:
            raise RuntimeError(description())
        self.threads = torch.get_num_threads() if threads is None else threads
        self.level = level or levels()[-1]
        self._library = found
        self.handle = new_pool(found, self.threads, level_index(found, self.level))
        if self.handle is None:
            raise RuntimeError(f"cannot start {self.threads} threads")

    def call(self, name: str, *arguments: object) -> None:
        """Call `npuq_<name>` on this pool, with addresses from `pointers.py`.

        Raises MemoryError when scratch memory runs out, ValueError for refused arguments.
        """
        status = call(self._library, name, self.handle, *arguments)
        if status:
            raise failure(name, status)

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self._library.npuq_pool_destroy(self.handle)
            self.handle = None
