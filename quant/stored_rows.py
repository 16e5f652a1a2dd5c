"""Stored rows of a weight: float32, bf16 or fp16, or FP8 with a scale for each block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockScale:
    """The scales of FP8 rows: float32 [row blocks, column blocks], one for each block that the rows touch; `first_row`
    is the index of row 0 within the first block."""

    scale: Tensor
    first_row: int
    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class StoredRows:
    """Rows [R, …] of float32, bf16 or fp16, or of FP8 with the scales of their blocks."""

    rows: Tensor
    blocks: BlockScale | None = None

    def to_float32(self) -> Tensor:
        """Decode to float32 [R, …]: float dtypes exactly, FP8 times the scale of its block."""
        if self.blocks is None:
            return self.rows.to(torch.float32)
        blocks = self.blocks
        return dequantize_fp8(self.rows, blocks.scale, blocks.first_row, blocks.block_rows, blocks.block_columns)

    def to(self, dtype: torch.dtype) -> Tensor:
        """Convert to a float dtype: unchanged where the rows have it, else `to_float32` rounded once."""
        if self.blocks is None and self.rows.dtype is dtype:
            return self.rows
        return self.to_float32().to(dtype)


def dequantize_fp8(stored: Tensor, scale: Tensor, first_row: int, block_rows: int, block_columns: int) -> Tensor:
    """FP8 rows times the scale of their block.

    `stored` float8_e4m3fn [R, K]; `scale` float32 [blocks, ceil(K / block_columns)] for the blocks that the rows touch;
    `first_row` is the index of row 0 within the first block. Returns float32 [R, K].
    """
    rows = stored.to(torch.float32)
    block_of_row = (torch.arange(rows.shape[0]) + first_row) // block_rows
    row_scale = scale[block_of_row]  # [R, column blocks]
    for column in range(scale.shape[1]):
        rows[:, column * block_columns : (column + 1) * block_columns].mul_(row_scale[:, column, None])
    return rows


def row_ranges(rows: int, columns: int, elements: int, block_rows: int = 1) -> Iterator[tuple[int, int]]:
    """Yield ranges of the rows of a matrix, of at most `elements` values (two rows at least), in whole blocks where
    they fit.

    Every range but the last has an even number of rows: two output rows share a byte of int4.
    """
    size = max(2, elements // max(1, columns))
    granule = lcm(block_rows, 2)
    size -= size % (granule if size >= granule else 2)
    for start in range(0, rows, size):
        yield start, min(start + size, rows)
