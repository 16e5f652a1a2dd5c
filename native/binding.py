"""The native kernels on torch tensors: quantization of stored rows, and the runtime's pool of threads.

torch computes the same integers (`schemes.quantize_rows`, `runtime/ops/reference/`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from ..dtypes import code_of
from ..quant.stored_rows import StoredRows
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
    Strided,
    Weights,
    call,
    description,
    level_index,
    levels,
    library,
    new_pool,
)
from .quantization import MOST_BIAS_COLUMNS, MOST_COLUMNS, NativeRows, Quantizer, SourceRows, failure

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
    "Quantized",
    "Quantizer",
    "SourceRows",
    "Strided",
    "Weights",
    "description",
    "levels",
    "library",
    "quantize",
    "source_rows",
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
LAYOUTS: Final = {"nz": 0, "nd": 1}


@dataclass(frozen=True)
class Quantized:
    """The fields of `NativeRows` as tensors."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    squared_error: Tensor
    squared_norm: Tensor


def source_rows(stored: StoredRows) -> SourceRows:
    """Stored rows [R, K], contiguous, as the kernels of conversion take them; nothing is copied."""
    blocks, code = stored.blocks, code_of(stored.rows.dtype)
    memory = stored.rows.view(torch.uint8).numpy()
    if blocks is None:
        return SourceRows(memory, code)
    block = blocks.block_rows, blocks.block_columns
    return SourceRows(memory, code, blocks.scale.numpy(), block, blocks.first_row)


def quantize(
    stored: StoredRows,
    bits: int,
    mse: bool,
    bias_columns: int,
    level: str | None = None,
) -> Quantized:
    """Quantize stored rows [R, K] in one pass, on the calling thread.

    R is even for 4 bits; K at most 2**17. The results equal those of `schemes.quantize_rows` on the decoded rows, bit
    for bit. Raises NonFiniteError, and RuntimeError without the native library.
    """
    count, columns, packed = stored.rows.shape[0], stored.columns, bits == 4
    out = NativeRows(
        np.empty((count // 2 if packed else count, columns), np.int8),
        np.empty((count, 1), np.float32),
        np.empty((count, bias_columns), np.float32) if packed else None,
        np.empty(count),
        np.empty(count),
    )
    rows = source_rows(StoredRows(stored.rows.contiguous(), stored.blocks))
    Quantizer(rows, bits, mse, out, level).run(0, count, 0)
    codes, scale, error, norm = map(torch.from_numpy, (out.codes, out.scale, out.squared_error, out.squared_norm))
    return Quantized(codes, scale, None if out.bias is None else torch.from_numpy(out.bias), error, norm)


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
