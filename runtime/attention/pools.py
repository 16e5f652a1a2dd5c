"""The paged cache of a layer: pools of one kind of row each, in blocks of tokens, in one of two layouts.

A block has a row for each token. A pool may have fewer: a row for every few tokens, or rows of a block's last tokens.

ND keeps a token's channels together: a block is `[block_size, 1, D]`. NZ (FRACTAL_NZ) keeps tiles of 16 channels
together: a block is `[D/16, block_size, 16]`. Channel d of slot s of a pool `[blocks, D/16, block_size, 16]` is
`[s // block_size, d // 16, s % block_size, d % 16]`. Tiles of an int8 pool have 32 channels, which are the same 32
bytes. To torch_npu this is an ordinary tensor: the format FRACTAL_NZ is not set on it (operator documentation of
`npu_fused_infer_attention_score`, 5-D key).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...errors import BackendError
from ...formats.kv_cache import INT8_CHANNELS, cached_latent, latent_codes

Layout = Literal["nz", "nd"]

CHANNELS = 16
"""Channels of a tile: 32 bytes of a 16-bit type. In any compute dtype, every backend keeps 16."""


@dataclass(frozen=True)
class Pool:
    """One row of every token in a layer's cache.

    dtype: None is the compute dtype. layout: None is the backend's choice. int8: the pool may hold int8 codes instead,
    given a scale for each channel. every: one row for so many tokens, which stands in the block of the last of them.
    last: a block keeps the rows of so many of its last tokens, those that were written last; None: of all.
    """

    name: str
    channels: int
    dtype: torch.dtype | None = None
    layout: Layout | None = None
    int8: bool = False
    every: int = 1
    last: int | None = None


@dataclass(frozen=True)
class StoredPool:
    """A pool with its dtype and layout decided."""

    name: str
    channels: int
    dtype: torch.dtype
    layout: Layout
    every: int = 1
    last: int | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of a row: of a token, if every token has one."""
        return self.channels * self.dtype.itemsize

    def block_bytes(self, block_size: int) -> int:
        """Bytes of a block of that many tokens."""
        return self.rows(block_size) * self.row_bytes

    def rows(self, block_size: int) -> int:
        """Rows of a block."""
        rows = -(-block_size // self.every)
        return rows if self.last is None else min(rows, self.last)

    def slots(self, positions: Tensor, blocks: Tensor, block_size: int) -> Tensor:
        """Slots of the rows of tokens: int64 `[n]`.

        positions: int64 `[n]`, in their sequence; of several tokens' row, that of the last. blocks: the sequence's.
        """
        rows, place = self.rows(block_size), positions % block_size
        within = place // self.every if self.last is None else place % rows
        return blocks[positions // block_size].long() * rows + within

    def shape(self, num_blocks: int, block_size: int) -> tuple[int, ...]:
        """Shape of the pool's tensor. Raises BackendError for channels that NZ tiles do not divide."""
        block_size = self.rows(block_size)
        if self.layout == "nd":
            return num_blocks, block_size, 1, self.channels
        tile = INT8_CHANNELS if self.dtype is torch.int8 else CHANNELS
        if self.channels % tile:
            raise BackendError(
                f"the NZ layout keeps {tile} channels of {self.dtype} together; {self.channels} are no multiple"
            )
        return num_blocks, self.channels // tile, block_size, tile


def stored_pools(
    pools: Iterable[Pool], dtype: torch.dtype, layout: Layout, scaled: Iterable[str] = ()
) -> tuple[StoredPool, ...]:
    """The pools of a layer in a compute dtype and a backend's layout; those named in `scaled` hold int8 codes.

    Raises BackendError for a name in `scaled` that is no pool of the layer, or one that cannot hold codes.
    """
    pools, scaled = tuple(pools), frozenset(scaled)
    if wrong := scaled - {pool.name for pool in pools if pool.int8}:
        raise BackendError(f"no int8 codes can stand in pools {sorted(wrong)} of this model's KV cache")
    return tuple(
        StoredPool(
            pool.name,
            pool.channels,
            torch.int8 if pool.name in scaled else pool.dtype or dtype,
            pool.layout or layout,
            pool.every,
            pool.last,
        )
        for pool in pools
    )


@dataclass(frozen=True)
class Pages:
    """The blocks of one pool of one layer, written in place.

    tensor: of the pool's shape. scale: None, or float `[channels]` on the tensor's device: then rows are int8 codes
    (`formats.kv_cache.latent_codes`), and a channel's value is code · scale. Scales are float32 or the compute dtype,
    in which they are exact.
    """

    pool: StoredPool
    tensor: Tensor
    scale: Tensor | None = None

    def write(self, slots: Tensor, rows: Tensor) -> None:
        """Write rows `[T, channels]` at slots int64 `[T]`, as codes in an int8 pool; skip negative slots."""
        write_rows(self.tensor, self.pool.layout, slots, rows if self.scale is None else latent_codes(rows, self.scale))

    def rounded(self, rows: Tensor) -> Tensor:
        """Round rows as an int8 pool does: code · scale, in the dtype of the rows. Other pools change nothing."""
        return rows if self.scale is None else cached_latent(rows, self.scale)

    def at(self, slots: Tensor) -> Tensor:
        """Rows at slots int64 of any shape: `[…, channels]`, codes of an int8 pool."""
        return rows_at(self.tensor, self.pool.layout, slots)

    def read(self, block_table: Tensor, length: int) -> Tensor:
        """The first `length` rows of the blocks int `[blocks]`: `[length, channels]`, codes of an int8 pool."""
        return read_rows(self.tensor, self.pool.layout, block_table, length)


@dataclass(frozen=True)
class LayerCache:
    """One layer's paged cache: the pages of its pools, by name."""

    pages: Mapping[str, Pages]
    block_size: int

    def __getitem__(self, name: str) -> Pages:
        return self.pages[name]

    def rows(self, name: str, positions: Tensor, blocks: Tensor) -> Tensor:
        """Rows of a pool at `positions` int64 `[n]` of the sequence that has these blocks: `[n, channels]`."""
        pages = self.pages[name]
        return pages.at(pages.pool.slots(positions, blocks, self.block_size))

    def put(self, name: str, positions: Tensor, blocks: Tensor, rows: Tensor) -> None:
        """Write rows `[n, channels]` of a pool at ascending `positions` int64 `[n]` of a sequence."""
        pages = self.pages[name]
        slots = pages.pool.slots(positions, blocks, self.block_size)
        if pages.pool.last is not None:  # of the tokens that share a slot, the last one stays
            within = pages.pool.rows(self.block_size)
            slots[:-within] = slots[:-within].masked_fill(slots[:-within] == slots[within:], -1)
        pages.write(slots, rows)


def write_rows(tensor: Tensor, layout: Layout, slots: Tensor, rows: Tensor) -> None:
    """Put rows `[T, D]` at slots int64 `[T]` of a pool's tensor, in its dtype; skip negative slots."""
    kept = slots >= 0
    slots, rows = slots[kept], rows[kept].to(tensor.dtype)
    if layout == "nd":
        block_size = tensor.shape[1]
        tensor[slots // block_size, slots % block_size, 0] = rows
        return
    block_size, tile = tensor.shape[2:]
    tensor[slots // block_size, :, slots % block_size] = rows.unflatten(-1, (-1, tile))


def rows_at(tensor: Tensor, layout: Layout, slots: Tensor) -> Tensor:
    """Rows at slots int64 of any shape of a pool's tensor: `[…, D]` (a copy)."""
    if layout == "nd":
        return tensor.flatten(0, 2)[slots]
    block_size = tensor.shape[2]
    return tensor[slots // block_size, :, slots % block_size].flatten(-2)


def read_rows(tensor: Tensor, layout: Layout, block_table: Tensor, length: int) -> Tensor:
    """The first `length` rows of the blocks int `[blocks]` of a pool's tensor: `[length, D]` (a copy)."""
    blocks = tensor.index_select(0, block_table)
    tokens = blocks.transpose(1, 2).flatten(2) if layout == "nz" else blocks.flatten(2)
    return tokens.flatten(0, 1)[:length]
