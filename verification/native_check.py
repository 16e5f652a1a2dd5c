"""Values of a weight on the native kernels: whether everything is right, and the error against the source.

What is wrong is for `values.py` to find and name: it reads the same weight again. A chunk of rows and the chunk of the
source's are read into memory that a thread keeps, and looked at once.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from ..dtypes import ITEM_BYTES, array_dtype
from ..formats.schemes import BIAS, OFFSET, SCALE, WEIGHT, is_native
from ..formats.sources.stored_linear import Codes, StoredLinear
from ..formats.sources.weights import RowBytes, Weight
from ..native import library as native
from ..native.quantization import (
    DECODED,
    MOST_BIAS_COLUMNS,
    MOST_COLUMNS,
    NUMBERS,
    are_finite,
    compare_rows,
    decode_rows,
)
from ..quant.scales import NonFiniteError
from ..quant.stored_rows import row_ranges
from ..quant.weight_error import ErrorSums

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Values in memory at a time.
_CHUNK_ELEMENTS = 1 << 20
_PACKED = {Codes.INT8: 1, Codes.INT4_OUTPUTS: 2}


class _Memory(threading.local):
    """Bytes that a thread reuses: fresh memory costs a page fault for each 4 KB."""

    def __init__(self) -> None:
        self._kept: dict[str, NDArray[np.uint8]] = {}

    def rows(self, use: str, count: int, row_bytes: int) -> NDArray[np.uint8]:
        """uint8 [count, row_bytes], in the memory of the last call for the same use."""
        nbytes = count * row_bytes
        if use not in self._kept or self._kept[use].size < nbytes:
            self._kept[use] = np.empty(nbytes, np.uint8)
        return self._kept[use][:nbytes].reshape(count, row_bytes)


_memory = _Memory()


def right_linear(linear: StoredLinear, source: Weight | None) -> ErrorSums | None:
    """The error of a linear of npuq's own against its source, 0 without one; None where something is wrong, or the
    kernels do not read one of them. Raises CheckpointError."""
    rows, columns = linear.shape
    packed, checkpoint = _PACKED.get(linear.codes), linear.checkpoint
    if packed is None or not is_native(linear.scheme, columns) or rows % packed:
        return None
    stored = None if source is None else source.row_bytes()
    if source is not None and (stored is None or stored.dtype not in NUMBERS):
        return None
    beside = {suffix: checkpoint.read_array(name) for suffix, name in linear.tensors.items() if suffix != WEIGHT}
    if any(array.dtype != np.float32 for array in beside.values()) or SCALE not in beside:
        return None
    scale, bias = beside[SCALE].reshape(-1), beside.get(BIAS)
    # Written so that NaN counts as wrong.
    if not (scale.size and 0 < float(scale.min()) <= float(scale.max()) < float("inf")):
        return None
    if OFFSET in beside and beside[OFFSET].any():
        return None
    slices = 0 if bias is None else bias.shape[1]
    if slices > MOST_BIAS_COLUMNS or (slices and columns % slices):
        return None
    error, norm = np.zeros((2, rows))
    for start, stop in row_ranges(rows, columns, _CHUNK_ELEMENTS, 1 if source is None else source.block_rows):
        codes = _memory.rows("codes", (stop - start) // packed, columns)
        checkpoint.read_bytes(linear.tensors[WEIGHT], start // packed * columns, codes.data.cast("B"))
        theirs = None
        if stored is not None:
            theirs = stored.rows_in(_read(stored, rows, start, stop), start)
        found = compare_rows(codes.view(np.int8), scale[start:stop], linear.scheme.weight_bits, slices, theirs)
        if bias is not None and not np.array_equal(
            bias[start:stop], (8 * found.sums).astype(np.float32) * scale[start:stop, None]
        ):
            return None
        error[start:stop], norm[start:stop] = found.squared_error, found.squared_norm
    return ErrorSums(float(error.sum()), float(norm.sum()))


def is_right_float(weight: Weight, source: Weight | None, expected: str | None) -> bool:
    """True where a float weight is finite, and its bits are the source's in the dtype `expected`; False where something
    is wrong, or the kernels do not read one of them. Raises CheckpointError."""
    stored = weight.row_bytes()
    if native.library() is None or stored is None or stored.dtype not in ITEM_BYTES or stored.scale is not None:
        return False
    rows, columns = weight.shape[0], int(np.prod(weight.shape[1:], dtype=np.int64))
    theirs = None if source is None else source.row_bytes()
    if not rows or not columns or (expected is not None and expected != stored.dtype):
        return False
    if source is not None and (theirs is None or theirs.dtype not in NUMBERS):
        return False
    decoded = theirs is not None and theirs.dtype != stored.dtype
    if decoded and (stored.dtype not in DECODED or columns > MOST_COLUMNS):
        return False
    for start, stop in row_ranges(rows, columns, _CHUNK_ELEMENTS, 1 if source is None else source.block_rows):
        ours = _read(stored, rows, start, stop, "codes")
        if not are_finite(ours.reshape(-1), stored.dtype):
            return False
        if theirs is None:
            continue
        read = _read(theirs, rows, start, stop)
        if decoded:
            out = np.empty((stop - start, columns), array_dtype(stored.dtype))
            try:
                decode_rows(theirs.rows_in(read, start), stored.dtype, out)
            except NonFiniteError:
                return False
            read = out.view(np.uint8)
        if not np.array_equal(ours, read):
            return False
    return True


def _read(stored: RowBytes, rows: int, start: int, stop: int, use: str = "source") -> NDArray[np.uint8]:
    """Rows [start, stop) of a weight of `rows` rows: uint8 [stop − start, bytes of a row]."""
    row_bytes = stored.nbytes // rows
    memory = _memory.rows(use, stop - start, row_bytes)
    stored.read(start * row_bytes, memory.data.cast("B"))
    return memory
