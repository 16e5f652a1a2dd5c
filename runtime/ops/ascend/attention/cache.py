"""Paged caches on the NPU, in FRACTAL_NZ or ND pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .....errors import BackendError
from ....attention.pools import LayerCache, Pages, Pool, StoredPool
from ...cache import NO_SCALES, Caches
from ..device import Npu
from .limits import INT8_BLOCK_SIZE


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
        if block_size != INT8_BLOCK_SIZE:
            raise BackendError(
                f"block_size {block_size}: the NPU's attention reads an int8 KV cache in pages of {INT8_BLOCK_SIZE} "
                "tokens only; leave block_size as it is, or the KV cache in the compute dtype (kv_cache_dtype auto)"
            )
        if not self.takes_int8:
            raise BackendError(
                "the NPU's attention reads an int8 KV cache in NZ pages and computes in bfloat16 then: "
                "leave kv_layout and dtype as they are, or the KV cache in the compute dtype"
            )
        # Scales are in the weights (LatentAttention.with_cache_scale): to the pages a latent is a code.
        pages = {pool.name: Pages(pool, self.zeros(pool, blocks, block_size)) for pool in self.stored(pools, scales)}
        return LayerCache(pages, block_size)
