"""int4 packing along the output dimension: byte [j, k] holds row 2j in its low nibble and row 2j + 1 in its high one,
two's complement, as ModelSlim stores W4A8 experts and both engines load them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..deferred import torch

if TYPE_CHECKING:
    from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] in -8..7, N even → int8 [N / 2, K]. Raises ValueError for an odd N."""
    if codes.shape[0] % 2:
        raise ValueError(f"int4 rows are packed in pairs: {codes.shape[0]} rows is odd")
    pairs = codes.view(torch.uint8)
    return (pairs[0::2] & 0x0F | pairs[1::2] << 4).view(torch.int8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse: int8 [N / 2, K] → codes int8 [N, K]."""
    rows = torch.empty((packed.shape[0] * 2, *packed.shape[1:]), dtype=torch.int8, device=packed.device)
    # Shifting left first moves the low nibble's sign bit to the byte's: the arithmetic shift back extends it.
    rows[0::2] = (packed << 4) >> 4
    rows[1::2] = packed >> 4
    return rows
