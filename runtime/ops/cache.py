"""The paged cache of a layer: its allocation, and reading of cached tokens. The same for every kind of attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..attention.pools import LayerCache, Layout, Pages, Pool, StoredPool, stored_pools

NO_SCALES: Mapping[str, Tensor] = {}


class Caches(ABC):
    """Maker and reader of paged caches.

    dtype: the compute dtype. layout: of pools for which the kind of attention names none.
    """

    def __init__(self, dtype: torch.dtype, layout: Layout = "nz"):
        self.dtype, self.layout = dtype, layout

    @abstractmethod
    def zeros(self, pool: StoredPool, num_blocks: int, block_size: int) -> Tensor:
        """Allocate the tensor of a pool, zeros of `pool.shape(num_blocks, block_size)`."""

    def new(
        self, pools: Sequence[Pool], num_blocks: int, block_size: int, scales: Mapping[str, Tensor] = NO_SCALES
    ) -> LayerCache:
        """Allocate the cache of a layer. Pools that have scales (float32 `[channels]`, by name) are int8.

        Raises BackendError for a setting that the backend's operators do not take.
        """
        return LayerCache(
            {
                pool.name: Pages(pool, self.zeros(pool, num_blocks, block_size), scales.get(pool.name))
                for pool in self.stored(pools, scales)
            },
            block_size,
        )

    def stored(self, pools: Sequence[Pool], scales: Mapping[str, Tensor] = NO_SCALES) -> tuple[StoredPool, ...]:
        """Pools of a layer as `new` makes them."""
        return stored_pools(pools, self.dtype, self.layout, scales)

    @property
    def takes_int8(self) -> bool:
        """True if `new` takes scales."""
        return True

    def gather(
        self, cache: LayerCache, blocks: Tensor, num_tokens: int, kept: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Copy cached tokens out of the pages: by pool, float `[num_tokens, channels]`, codes decoded.

        blocks: int `[blocks]`. kept: int64 `[num_tokens]`, rows of those blocks; None: the first ones.
        """
        # npu_gather_pa_kv_cache recognises NZ pages by the tensor's format, which a cache must not have.
        gathered = {}
        for name, pages in cache.pages.items():
            length = num_tokens if kept is None else blocks.shape[0] * cache.block_size
            rows = pages.read(blocks, length)
            rows = rows if kept is None else rows.index_select(0, kept)
            gathered[name] = (rows if pages.scale is None else rows * pages.scale).to(self.dtype)
        return gathered
