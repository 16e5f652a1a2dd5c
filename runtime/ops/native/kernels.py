"""Pool of threads and compute dtype, shared by all parts of the native operators."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import BackendError
from ....native.binding import DTYPES, Pool


@dataclass(frozen=True)
class Kernels:
    """Native kernels. pool: of threads. dtype_code: the library's number of the compute dtype."""

    pool: Pool
    dtype: torch.dtype
    dtype_code: int

    @classmethod
    def start(cls, dtype: torch.dtype, threads: int | None, level: str | None) -> Kernels:
        """Start the threads. Raises BackendError for a dtype that the kernels do not compute in."""
        if dtype not in (torch.float32, torch.bfloat16):
            raise BackendError(f"the native kernels compute in float32 or bfloat16, not {dtype}")
        return cls(Pool(threads, level), dtype, DTYPES[dtype])


def gain(gamma: Tensor, dtype: torch.dtype) -> Tensor:
    """A norm's gain in the compute dtype, contiguous."""
    # `to` takes a microsecond even if it changes nothing.
    return (gamma if gamma.dtype is dtype else gamma.to(dtype)).contiguous()


def contiguous_rows(x: Tensor) -> Tensor:
    """Make each row contiguous; rows may be apart."""
    return x if x.stride(-1) == 1 else x.contiguous()
