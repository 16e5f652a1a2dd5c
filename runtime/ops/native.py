"""The CPU's operators on native kernels: memory-mapped weights are used as they are stored, by one pool of threads.

Integers equal the reference's; floats differ in the last bits (order of additions, exp). Operators that no step spends
time in stay torch's.
"""

from __future__ import annotations

import torch

from .native_attention import NativeAttention
from .native_routing import NativeRouting


class NativeOps(NativeAttention, NativeRouting):
    """CpuOps with its inner loops in C. dtype is float32 or bfloat16; threads and level: those of `Pool`.

    Raises BackendError for another dtype.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, threads: int | None = None, level: str | None = None):
        super().__init__(dtype, threads, level)
