"""Paged caches on the NPU, in FRACTAL_NZ or ND pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....errors import BackendError
from ...attention.pools import LayerCache, Pool, StoredPool
from ..cache import NO_SCALES, Caches
from .device import Npu


class AscendCaches(Caches):
    """Caches in the sizes, layouts and dtypes that the NPU's attention reads."""

    def __init__(self, npu: Npu):
        super().__init__(npu.dtype, npu.kv_layout)
        self.npu = npu

    @property
    def takes_int8(self) -> bool:
        return self.layout == "nz" and self.dtype != torch.float16

    def zeros(self, pool: StoredPool, num_blocks: int, block_size: int) -> Tensor:
        return torch.zeros(pool.shape(num_blocks, block_size), dtype=pool.dtype, device=self.npu.device)

    def new(
        self, pools: Sequence[Pool], num_blocks: int, block_size: int, scales: Mapping[str, Tensor] = NO_SCALES
    ) -> LayerCache:
        if block_size % 16 or not 0 < block_size <= 1024:
            raise BackendError(f"block_size {block_size}: the NPU's paged attention takes multiples of 16 up to 1024")
        # One block more, of no sequence. A captured step's padding is written there, and so are tokens that are not
        # cached where rows are written by index: slot −1 is in the last block.
        blocks = num_blocks + 1
        if not scales:
            return super().new(pools, blocks, block_size)
        if not self.takes_int8:
            raise BackendError(
                "the NPU's attention reads an int8 KV cache in NZ pages and computes in bfloat16 then: "
                "leave kv_layout and dtype as they are, or the KV cache in the compute dtype"
            )
        on_device = {name: scale.to(self.npu.device, self.npu.dtype) for name, scale in scales.items()}
        return super().new(pools, blocks, block_size, on_device)
