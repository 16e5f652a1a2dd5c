"""FRACTAL_NZ of the paged cache: within a block, 16 channels of a token are contiguous, then come the tokens.

A block `[block_size, D]` is stored as `[D/16, block_size, 16]`, so that channel d of the token at slot s of a cache
`[blocks, D/16, block_size, 16]` is `[s // block_size, d // 16, s % block_size, d % 16]`. An int8 cache has 32 channels
where the others have 16. This is an arrangement of bytes in an ordinary tensor, not a tensor format that torch_npu
knows of (operator documentation of `npu_fused_infer_attention_score`, 5-D key).
"""

from __future__ import annotations

from torch import Tensor

CHANNELS = 16
"""Channels of a tile: 32 bytes of a 16-bit type. Every backend keeps 16 in the compute dtype, whatever that is."""


def nz_from_nd(blocks: Tensor) -> Tensor:
    """`[blocks, block_size, D]` → `[blocks, D/16, block_size, 16]` (a copy)."""
    tiles: Tensor = blocks.unflatten(-1, (-1, CHANNELS))
    return tiles.transpose(1, 2).contiguous()


def nd_from_nz(blocks: Tensor) -> Tensor:
    """`[blocks, D/16, block_size, 16]` (or tiles of 32) → `[blocks, block_size, D]` (a copy)."""
    return blocks.transpose(1, 2).flatten(2)


def write_nz(cache: Tensor, slots: Tensor, rows: Tensor) -> None:
    """Put rows `[T, D]` at slots int64 `[T]` of a cache `[blocks, D/16, block_size, 16]` (or tiles of 32); skip the
    negative ones."""
    block_size, tile = cache.shape[2:]
    kept = slots >= 0
    slots, rows = slots[kept], rows[kept]
    cache[slots // block_size, :, slots % block_size] = rows.unflatten(-1, (-1, tile)).to(cache.dtype)


def read_nz(cache: Tensor, block_table: Tensor, length: int) -> Tensor:
    """The first `length` tokens of the blocks int `[blocks]`: `[length, D]`."""
    return nd_from_nz(cache[block_table.long()]).flatten(0, 1)[:length]
