"""FRACTAL_NZ on the CPU: the bytes really are rearranged, and the storage is remembered as being in that format.

A tensor in format 29 keeps its logical shape (as on the device), so reading it without knowing its format gives
nonsense, as on the device. Formats are remembered by storage: a `.view(dtype)` keeps the format, a copy has none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .emulate import RefusedError

ND = 2
FRACTAL_NZ = 29
TILE_ROWS = 16
TILE_BYTES = 32

# Storages are kept alive, so that no later tensor can reuse the address of one that is remembered here.
_nz: dict[int, torch.UntypedStorage] = {}


def format_of(tensor: Tensor) -> int:
    """ND or FRACTAL_NZ."""
    return FRACTAL_NZ if tensor.untyped_storage().data_ptr() in _nz else ND


def to_nz(matrix: Tensor) -> Tensor:
    """Logical `[..., K, N]` → the same shape, stored as `[..., N / d0, K / 16, 16, d0]` and remembered as FRACTAL_NZ.

    d0 is 32 bytes of elements. Raises ValueError where K or N does not fill its tiles.
    """
    *batch, k, n = matrix.shape
    d0 = TILE_BYTES // matrix.element_size()
    if k % TILE_ROWS or n % d0:
        raise ValueError(f"[{k}, {n}] {matrix.dtype} does not fill tiles of [{TILE_ROWS}, {d0}]")
    tiles = matrix.reshape(*batch, k // TILE_ROWS, TILE_ROWS, n // d0, d0)
    stored = tiles.movedim(-2, -4).contiguous().view(matrix.shape)
    _nz[stored.untyped_storage().data_ptr()] = stored.untyped_storage()
    return stored


def to_nd(tensor: Tensor) -> Tensor:
    """The logical elements of a tensor in either format; int32 in NZ holds packed int4 of an int8 cast."""
    if format_of(tensor) == ND:
        return tensor
    if tensor.storage_offset() or not tensor.is_contiguous():
        raise RefusedError("a view into a FRACTAL_NZ tensor loses its format")
    *batch, k, n = tensor.shape
    d0 = TILE_BYTES // tensor.element_size()
    tiles = tensor.view(*batch, n // d0, k // TILE_ROWS, TILE_ROWS, d0)
    return tiles.movedim(-4, -2).reshape(tensor.shape)


def unpack_int4(packed: Tensor) -> Tensor:
    """int32 `[..., N / 8]` → int8 `[..., N]`: element i of eight in bits 4i to 4i + 3, two's complement."""
    shifts = torch.arange(28, -4, -4, dtype=torch.int32)
    nibbles = (packed.unsqueeze(-1) << shifts) >> 28
    return nibbles.to(torch.int8).flatten(-2)
