"""Structs of the paged cache and of attention heads for native calls."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....native.binding import DTYPES, Cache, Heads, Strided
from ....native.pointers import address, rows_address
from ...attention.pools import LayerCache
from ..attention import LATENT, ROPE


@dataclass(frozen=True)
class NativeCache(LayerCache):
    """A layer's latent cache with `struct`, its struct for native calls.

    dtype: of the rope pool, the compute dtype. latent_dim and rope_dim count channels.
    """

    struct: Cache = field(repr=False)
    dtype: torch.dtype
    latent_dim: int
    rope_dim: int


def native_cache(cache: LayerCache) -> NativeCache:
    """Add the struct to a cache. Raises ValueError for other pools than a latent and a rope in NZ layout."""
    if isinstance(cache, NativeCache):
        return cache
    blocks, dtype = cache[LATENT].tensor.shape[0], cache[ROPE].pool.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kv cache: rope is {dtype}; the native kernels take float32 and bfloat16")
    addresses, scales = {}, {}
    for name, pages in cache.pages.items():
        pool, scale = pages.pool, pages.scale
        if pool.layout != "nz" or pool.dtype is not (dtype if scale is None else torch.int8):
            raise ValueError(f"kv cache: {name} is {pool.dtype} in {pool.layout} layout; the native kernels take NZ")
        shape = pool.shape(blocks, cache.block_size)
        addresses[name] = address(pages.tensor, "kv cache", name, pool.dtype, *shape)
        if scale is not None:
            scales[name] = address(scale, "kv cache", f"scale of {name}", torch.float32, pool.channels)
    channels = cache[LATENT].pool.channels, cache[ROPE].pool.channels
    struct = Cache(
        addresses[LATENT], addresses[ROPE], blocks, cache.block_size, *channels, scales.get(LATENT), DTYPES[dtype]
    )
    return NativeCache(cache.pages, cache.block_size, struct, dtype, *channels)


def native_heads(
    dtype: torch.dtype, q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor
) -> Heads:
    """Struct of tensors `[tokens, heads, channels]` with contiguous channels; k_rope has one head for all."""
    (tokens, heads, nope), rope = q_nope.shape, q_rope.shape[-1]
    keys, width = k_nope.shape[0], value.shape[-1]

    def strided(name: str, x: Tensor, *shape: int) -> Strided:
        start = rows_address(x, "attention", name, dtype, *shape)
        return Strided(start, x.stride(0), x.stride(1) if shape[1] > 1 else 0)

    return Heads(
        strided("q_nope", q_nope, tokens, heads, nope),
        strided("q_rope", q_rope, tokens, heads, rope),
        strided("k_nope", k_nope, keys, heads, nope),
        strided("k_rope", k_rope, keys, 1, rope),
        strided("value", value, keys, heads, width),
        heads,
        nope,
        rope,
        width,
        DTYPES[dtype],
    )
