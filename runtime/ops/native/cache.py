"""The paged cache and the heads of attention as the native kernels take them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....formats.kv_cache import INT8_CHANNELS
from ....native.binding import DTYPES, Cache, Heads, Strided
from ....native.pointers import address, rows_address
from ...layout import CHANNELS
from ..steps import LayerCache


@dataclass(frozen=True)
class NativeCache(LayerCache):
    """A layer's cache, and `struct`: the same as calls take it. latent_dim and rope_dim count channels."""

    struct: Cache = field(repr=False, kw_only=True)
    latent_dim: int = field(kw_only=True)
    rope_dim: int = field(kw_only=True)


def native_cache(cache: LayerCache) -> NativeCache:
    """The cache with its struct. Raises ValueError for pools that are not one cache in NZ layout."""
    if isinstance(cache, NativeCache):
        return cache
    (blocks, latent_groups, _, _), (_, rope_groups, _, _) = cache.latent.shape, cache.rope.shape
    dtype, scale = cache.rope.dtype, cache.latent_scale
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kv cache: rope is {dtype}; the native kernels take float32 and bfloat16")
    tile, latent_dtype = (CHANNELS, dtype) if scale is None else (INT8_CHANNELS, torch.int8)
    channels = latent_groups * tile, rope_groups * CHANNELS
    latent_shape = blocks, latent_groups, cache.block_size, tile
    rope_shape = blocks, rope_groups, cache.block_size, CHANNELS
    struct = Cache(
        address(cache.latent, "kv cache", "latent", latent_dtype, *latent_shape),
        address(cache.rope, "kv cache", "rope", dtype, *rope_shape),
        blocks,
        cache.block_size,
        *channels,
        None if scale is None else address(scale, "kv cache", "scale", torch.float32, channels[0]),
        DTYPES[dtype],
    )
    return NativeCache(
        cache.latent, cache.rope, cache.block_size, scale, struct=struct, latent_dim=channels[0], rope_dim=channels[1]
    )


def native_heads(
    dtype: torch.dtype, q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor
) -> Heads:
    """Tensors `[tokens, heads, channels]` whose channels lie together; k_rope has one head for all."""
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
