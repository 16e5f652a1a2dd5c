"""Structs of the paged cache for native calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from ....native.binding import DTYPES, LAYOUTS
from ....native.binding import Pages as PagesStruct
from ....native.pointers import address
from ...attention.pools import LayerCache, Pages, Pool
from ..cache import NO_SCALES
from ..reference.cache import ReferenceCaches

Made = TypeVar("Made")


@dataclass(frozen=True)
class NativeCache(LayerCache):
    """A layer's cache with `structs`, the struct of each pool by name."""

    structs: Mapping[str, PagesStruct] = field(repr=False)
    _made: dict[object, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, make: Callable[[NativeCache], Made]) -> Made:
        """Arguments that `make` makes of this cache, made once."""
        found: Made | None = self._made.get(make)
        if found is None:
            found = self._made[make] = make(self)
        return found


def native_cache(cache: LayerCache) -> NativeCache:
    """Add the structs to a cache. Raises ValueError for pools of other sizes than theirs, and codes without scales."""
    if isinstance(cache, NativeCache):
        return cache
    return NativeCache(
        cache.pages, cache.block_size, {name: _struct(pages, cache.block_size) for name, pages in cache.pages.items()}
    )


def native_pages(pages: Pages) -> PagesStruct:
    """The struct of one pool; errors as of `native_cache`."""
    return _struct(pages, pages.tensor.shape[2 if pages.pool.layout == "nz" else 1])


def _struct(pages: Pages, block_size: int) -> PagesStruct:
    pool, scale, blocks = pages.pool, pages.scale, pages.tensor.shape[0]
    if (pool.dtype is torch.int8) != (scale is not None) or (scale is not None and pool.layout != "nz"):
        scales = "without scales" if scale is None else "with scales"
        raise ValueError(
            f"kv cache: {pool.name} is {pool.dtype} in {pool.layout} layout {scales}; the native kernels take int8 in "
            "NZ with scales, and other dtypes without"
        )
    return PagesStruct(
        address(pages.tensor, "kv cache", pool.name, pool.dtype, *pool.shape(blocks, block_size)),
        scale if scale is None else address(scale, "kv cache", f"scale of {pool.name}", torch.float32, pool.channels),
        blocks,
        block_size,
        pool.channels,
        DTYPES[pool.dtype],
        LAYOUTS[pool.layout],
    )


class NativeCaches(ReferenceCaches):
    """Caches with structs for native calls."""

    def new(
        self, pools: Sequence[Pool], num_blocks: int, block_size: int, scales: Mapping[str, Tensor] = NO_SCALES
    ) -> LayerCache:
        return native_cache(super().new(pools, num_blocks, block_size, scales))
