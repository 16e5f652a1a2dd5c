"""The native kernels seen from torch: quantization of stored rows, and the pool of threads that the runtime uses.

What is computed here, torch computes too, with the same integers (`schemes.quantize_rows`, `runtime/ops/reference.py`).
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .dialects import BlockScale, StoredRows
from .library import (
    Cache,
    Heads,
    MlaBlock,
    MoeBlock,
    Part,
    Source,
    Strided,
    Weights,
    description,
    level_index,
    levels,
    library,
)
from .scales import NonFiniteError

__all__ = [
    "DTYPES",
    "INT4",
    "MOST_COLUMNS",
    "Cache",
    "Heads",
    "MlaBlock",
    "MoeBlock",
    "NativeRows",
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
}
INT4: Final = 5
# The widest row that `quantize` takes: its sums are exact up to here.
MOST_COLUMNS: Final = 1 << 17


_NO_MEMORY, _NOT_FINITE = 1, 2


@dataclass(frozen=True)
class NativeRows:
    """Rows as `quantize` leaves them: codes int8 [R, K], or [R / 2, K] packed with bias [R, columns] for 4 bits; scale
    float32 [R, 1]; squared_error and squared_norm float64 [R]."""

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

    R is even for 4 bits; K at most 2**17. The numbers are those of `schemes.quantize_rows` on the decoded rows, bit for
    bit. Raises NonFiniteError, and RuntimeError where there is no library.
    """
    (count, columns), packed = stored.rows.shape, bits == 4
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
    """`quantize` for one piece of a weight after the other, with all addresses worked out once.

    `stored.rows` [R, K] is memory that is filled anew for each piece, `stored.blocks` scales from the weight's first
    row on. `out` has results of all its rows, but for codes, of which there may be fewer. All are contiguous.
    """

    def __init__(self, stored: StoredRows, bits: int, mse: bool, out: NativeRows, level: str | None = None):
        found = library()
        if found is None:
            raise RuntimeError(description())
        self._call = found.npuq_quantize_rows
        self._level = -1 if level is None else level_index(found, level)
        self._source = _source(stored.rows, stored.blocks)
        self._first_row = self._source.first_row
        self._columns = stored.rows.shape[1]
        self._bits, self._mse = bits, mse
        self._bias_columns = 0 if out.bias is None else out.bias.shape[1]
        self._codes, self._scale = out.codes.data_ptr(), out.scale.data_ptr()
        self._bias = None if out.bias is None else out.bias.data_ptr()
        self._error, self._norm = out.squared_error.data_ptr(), out.squared_norm.data_ptr()
        self._kept = stored, out

    def run(self, start: int, count: int, code_row: int) -> None:
        """Quantize the first `count` rows of the memory, which are rows `start` and on of the weight.

        Codes go to rows `code_row` and on of theirs. Raises NonFiniteError.
        """
        self._source.first_row = self._first_row + start
        bad_row = c_int64()
        status = self._call(
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
        if status == _NO_MEMORY:
            raise MemoryError(f"no memory to quantize rows of {self._columns} weights")


def _source(rows: Tensor, blocks: BlockScale | None) -> Source:
    code = DTYPES[rows.dtype]
    if blocks is None:
        return Source(rows.data_ptr(), None, 0, 0, 1, max(1, rows.shape[1]), code)
    if blocks.scale.dtype != torch.float32 or not blocks.scale.is_contiguous():
        raise ValueError("block scales must be contiguous float32")
    return Source(
        rows.data_ptr(),
        blocks.scale.data_ptr(),
        blocks.scale.shape[1],
        blocks.first_row,
        blocks.block_rows,
        blocks.block_columns,
        code,
    )


class Pool:
    """Threads that share out the work of one call at a time; calls from several Python threads take turns.

    threads: how many work, the caller's included; None for torch's own number, which follows OMP_NUM_THREADS.
    level: an instruction-set level by name; None for the best. Raises RuntimeError where there is no library, or the
    level cannot run here.
    """

    def __init__(self, threads: int | None = None, level: str | None = None):
        found = library()
        if found is None:
            raise RuntimeError(description())
        self.threads = torch.get_num_threads() if threads is None else threads
        self.level = level or levels()[-1]
        self._library = found
        self.handle: int | None = found.npuq_pool_create(self.threads, level_index(found, self.level))
        if self.handle is None:
            raise RuntimeError(f"cannot start {self.threads} threads")

    def call(self, name: str, *arguments: object) -> None:
        """Call `npuq_<name>` on this pool. Raises MemoryError when its scratch cannot be had."""
        if getattr(self._library, "npuq_" + name)(self.handle, *arguments):
            raise MemoryError(f"npuq_{name}: no memory for scratch")

    def __del__(self) -> None:
        if getattr(self, "handle", None) is not None:
            self._library.npuq_pool_destroy(self.handle)
            self.handle = None
