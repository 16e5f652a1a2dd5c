"""The CPU's operators on native kernels: memory-mapped weights are used as they are stored, by one pool of threads.

Integers equal the reference's; floats differ in the last bits (order of additions, exp). Operators that no step spends
time in stay torch's.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from ....parallel.torch_threads import single_threaded_torch
from .. import Ops
from ..cpu import CpuOps
from .attention import NativeAttention
from .kernels import Kernels
from .norms import NativeNorms
from .products import NativeProducts
from .routing import NativeRouting
from .weights import NativeWeights


class NativeOps(Ops):
    """Inner loops in C, and beside them the parts of `CpuOps`. dtype is float32 or bfloat16; threads and level: those
    of `Pool`.

    Raises BackendError for another dtype.
    """

    name = "cpu"

    def __init__(self, dtype: torch.dtype = torch.float32, threads: int | None = None, level: str | None = None):
        beside, kernels = CpuOps(dtype), Kernels.start(dtype, threads, level)
        self.dtype, self.device, self.pool = dtype, beside.device, kernels.pool
        self.weights = NativeWeights(beside.weights)
        self.norms = NativeNorms(kernels, beside.norms)
        self.products = NativeProducts(kernels, self.norms, beside.products)
        self.routing = NativeRouting(kernels, self.norms, self.products)
        self.attention = NativeAttention(kernels, self.weights, self.norms, self.products, beside.attention)

    def one_thread(self) -> AbstractContextManager[None]:
        return single_threaded_torch()
