"""The CPU's operators on native kernels, which read the memory-mapped weights in place, with one pool of threads.

Integers equal the reference's; floats differ in the last bits (order of additions, exp). Operators that cost a step no
time stay torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ....parallel.torch_threads import single_threaded_torch
from ...ranks.group import ALONE, Group
from ...sampling.rows import LogitRow
from .. import Ops
from ..cpu import CpuOps
from .cache import NativeCaches
from .grouped_attention import NativeGroupedAttention
from .kernels import Kernels
from .latent_attention import NativeLatentAttention
from .logits import native_rows
from .norms import NativeNorms
from .products import NativeProducts
from .rotary import NativeRotary
from .routing import NativeRouting
from .sparse_attention import NativeSparseAttention
from .weights import NativeWeights


class NativeOps(Ops):
    """Native kernels, and the parts of `CpuOps` for the rest.

    dtype: float32 or bfloat16. threads, level: of `Pool`. Raises BackendError for another dtype.
    """

    name = "cpu"

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        threads: int | None = None,
        level: str | None = None,
        group: Group = ALONE,
    ):
        beside, kernels = CpuOps(dtype, group), Kernels.start(dtype, threads, level)
        self.group = group
        self.dtype, self.device, self.pool = dtype, beside.device, kernels.pool
        self.weights = NativeWeights(beside.weights)
        self.norms = NativeNorms(kernels, beside.norms)
        self.products = NativeProducts(kernels, self.norms, beside.products)
        self.routing = NativeRouting(kernels, self.norms, self.products, group)
        self.caches = NativeCaches(dtype)
        self.rotary = NativeRotary(kernels, beside.rotary)
        self.mla = NativeLatentAttention(kernels, self.weights, self.norms, self.products, self.rotary, beside.mla)
        self.sparse = NativeSparseAttention(kernels, self.weights, self.norms, self.products, self.rotary)
        self.gqa = NativeGroupedAttention(kernels, self.weights, self.norms, self.products, self.rotary)

    @property
    def arithmetic(self) -> str:
        return f"native kernels for {self.pool.level}"

    def logit_rows(self, logits: Tensor) -> Sequence[LogitRow]:
        return native_rows(logits, self.pool)

    def one_thread(self) -> AbstractContextManager[None]:
        return single_threaded_torch()
