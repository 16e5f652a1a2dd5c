"""Stored rows of a weight: float32, bf16 or fp16, or FP8 or packed int4 with a scale for each block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import TYPE_CHECKING

from ..deferred import torch
from .float8 import decode_e4m3

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BlockScale:
    """The scales of FP8 or int4 rows: float32 [row blocks, column blocks], one for each block that the rows touch.
    `first_row` is the index of row 0 within the first block."""

    scale: Tensor
    first_row: int
    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class StoredRows:
    """Rows [R, …] of float32, bf16 or fp16; or rows [R, K] of FP8, or of int4 codes in bytes [R, K / 2], with the
    scales of their blocks.

    A byte of int4 has the code of an even input in its low nibble and of the next input in its high one, 8 added to
    each.
    """

    rows: Tensor
    blocks: BlockScale | None = None

    @property
    def columns(self) -> int:
        """Values of a row of a matrix."""
        return self.rows.shape[1] * (2 if self.rows.dtype is torch.uint8 else 1)

    def to_float32(self) -> Tensor:
        """Decode to float32 [R, …]: float dtypes exactly, FP8 and int4 times the scale of the block."""
        if self.blocks is None:
            return self.rows.to(torch.float32)
        return _scaled(_int4_codes(self.rows) if self.rows.dtype is torch.uint8 else self.rows, self.blocks)

    def to(self, dtype: torch.dtype) -> Tensor:
        """Convert to a float dtype: unchanged where the rows have it, else `to_float32` rounded once."""
        if self.blocks is None and self.rows.dtype is dtype:
            return self.rows
        return self.to_float32().to(dtype)


def _int4_codes(packed: Tensor) -> Tensor:
    """Unpack uint8 [R, K / 2] to int8 [R, K] in −8 to 7."""
    nibbles = torch.stack((packed & 15, packed >> 4), dim=2)
    return nibbles.view(torch.int8).flatten(1).sub_(8)


def _scaled(codes: Tensor, blocks: BlockScale) -> Tensor:
    """Multiply codes [R, K], FP8 or int8, by the scale of their block, in float32."""
    rows = decode_e4m3(codes) if codes.dtype is torch.float8_e4m3fn else codes.to(torch.float32)
    width = blocks.block_columns
    scale = blocks.scale
    if blocks.block_rows > 1:
        scale = scale[(torch.arange(rows.shape[0]) + blocks.first_row) // blocks.block_rows]  # [R, column blocks]
    else:
        scale = scale[blocks.first_row : blocks.first_row + rows.shape[0]]
    if rows.shape[1] % width == 0:
        rows.view(rows.shape[0], scale.shape[1], width).mul_(scale[:, :, None])
        return rows
    for column in range(scale.shape[1]):
        rows[:, column * width : (column + 1) * width].mul_(scale[:, column, None])
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
