"""Stored weights and caches as the native kernels take them: by address, beside what keeps the memory behind it.

A handle is looked at when it is made: its tensors have the dtypes and the sizes that its struct says. An operator then
has only to look at what changes from call to call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ...errors import BackendError
from ...formats.kv_cache import INT8_CHANNELS
from ...formats.schemes import Scheme
from ...native.binding import DTYPES, INT4, Cache, Heads, MlaBlock, MoeBlock, Part, Strided, Weights
from ...native.pointers import address, rows_address
from ..layout import CHANNELS
from . import LayerCache, LinearPart, MlaWeights, MlpWeights, MoeWeights

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class NativeLinear:
    """Stored weights by address: `weights` for the kernels, `owners` to keep the memory behind it."""

    weights: Weights
    quantized: bool
    name: str
    owners: tuple[object, ...] = field(repr=False)

    @property
    def address(self) -> int:
        return ctypes.addressof(self.weights)

    @property
    def pointer(self) -> ctypes._Pointer[Weights]:
        return ctypes.pointer(self.weights)


@dataclass(frozen=True)
class NativeMla(MlaWeights):
    """The default handle, and `block`: all of it as one call takes it."""

    block: MlaBlock = field(repr=False)


@dataclass(frozen=True)
class NativeCache(LayerCache):
    """A layer's cache, and `struct`: the same as calls take it. latent_dim and rope_dim count channels."""

    struct: Cache = field(repr=False, kw_only=True)
    latent_dim: int = field(kw_only=True)
    rope_dim: int = field(kw_only=True)


def native_mla(handle: MlaWeights, dtype: torch.dtype) -> MlaWeights:
    """The handle with its block; as it is where its linears are not all the kernels' own, or not fused.

    `dtype` is the compute dtype. Raises ValueError for widths that are not those of the handle's config.
    """
    q_b, w_uk, w_uv = handle.q_b, handle.w_uk, handle.w_uv
    linears = [*handle.qkv_a, handle.o, *([] if q_b is None else [q_b])]
    if len(handle.qkv_a) != 1 or not all(isinstance(linear, NativeLinear) for linear in linears):
        return handle
    if 1 not in w_uk.stride()[1:] or 1 not in w_uv.stride()[1:]:
        return handle
    config, q_a_norm, q_a_width = handle.config, handle.q_a_norm, _check_mla(handle)
    heads, latent = config.num_heads, config.kv_lora_rank
    strides = ctypes.c_int64 * 3
    block = MlaBlock(
        qkv_a=handle.qkv_a[0].pointer,
        q_b=None if q_b is None else q_b.pointer,
        o=handle.o.pointer,
        q_a_norm=None if q_a_norm is None else address(q_a_norm, "mla", "q_a_norm", dtype, q_a_width),
        kv_a_norm=address(handle.kv_a_norm, "mla", "kv_a_norm", dtype, latent),
        w_uk=matrices_address(w_uk, "mla", "w_uk", heads, config.qk_nope_head_dim, latent),
        w_uv=matrices_address(w_uv, "mla", "w_uv", heads, latent, config.v_head_dim),
        w_uk_strides=strides(*w_uk.stride()),
        w_uv_strides=strides(*w_uv.stride()),
        heads=heads,
        nope_dim=config.qk_nope_head_dim,
        value_dim=config.v_head_dim,
        kv_b_dtype=DTYPES[w_uk.dtype],
        eps=config.rms_norm_eps,
    )
    return NativeMla(**{each.name: getattr(handle, each.name) for each in fields(MlaWeights)}, block=block)


def _check_mla(handle: MlaWeights) -> int:
    """Compare the widths of a layer's linears with its config; the width of q_a."""
    config, qkv_a, q_b = handle.config, handle.qkv_a[0].weights, handle.q_b
    q_width = config.num_heads * config.qk_head_dim
    q_a_width = q_width if q_b is None else q_b.weights.cols
    widths = {
        "outputs of q_a and kv_a": (qkv_a.outputs, q_a_width + config.kv_lora_rank + config.qk_rope_head_dim),
        "outputs of q_b": (q_width if q_b is None else q_b.weights.outputs, q_width),
        "inputs of o": (handle.o.weights.cols, config.num_heads * config.v_head_dim),
    }
    for what, (found, expected) in widths.items():
        if found != expected:
            raise ValueError(f"mla: {found} {what}; the layer's config says {expected}")
    if (q_b is None) != (handle.q_a_norm is None):
        raise ValueError("mla: q_b and q_a_norm come together")
    if handle.w_uk.dtype is not handle.w_uv.dtype:
        raise ValueError(f"mla: w_uk is {handle.w_uk.dtype} and w_uv {handle.w_uv.dtype}; the kernel takes one dtype")
    return q_a_width


def native_moe(weights: MoeWeights, shared: MlpWeights | None) -> MoeBlock | None:
    """A layer's experts as one call takes them; None where its linears are not all the kernels' own."""
    linears = [weights.router, weights.gate_up, weights.down]
    linears += [] if shared is None else [shared.gate_up, shared.down]
    if not all(isinstance(linear, NativeLinear) for linear in linears):
        return None
    names = ("router", "gate_up", "down", "shared_gate_up", "shared_down")
    gating = weights.gating
    return MoeBlock(
        **{name: linear.pointer for name, linear in zip(names, linears, strict=False)},
        bias=bias_address(weights.correction_bias, "moe_layer", weights.router.weights.outputs),
        k=gating.k,
        groups=gating.group_count,
        top_groups=gating.k_group,
        sigmoid=gating.scoring == "sigmoid",
        select_two=gating.group_select_mode,
        renormalize=gating.renormalize,
        scaling=gating.scaling,
    )


def bias_address(bias: Tensor | None, operator: str, experts: int) -> int | None:
    """Of a router's bias, float32 `[experts]`, if it has one."""
    return None if bias is None else address(bias, operator, "bias", torch.float32, experts)


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


def native_linear(groups: Sequence[Sequence[LinearPart]]) -> NativeLinear:
    """Groups of parts, the same count in each, fused along their outputs.

    Raises BackendError where their shapes, dtypes or schemes do not allow it.
    """
    first = groups[0][0]
    owners: list[Tensor] = []
    parts = (Part * (len(groups) * len(groups[0])))()
    outputs = _outputs(groups[0])
    for group in groups:
        if len(group) != len(groups[0]) or _outputs(group) != outputs:
            raise BackendError(f"{group[0].name}: the experts of a layer must have one shape")
    for index, part in enumerate(part for group in groups for part in group):
        if (part.scheme, part.weight.dtype, part.weight.shape[1:]) != (
            first.scheme,
            first.weight.dtype,
            first.weight.shape[1:],
        ):
            raise BackendError(f"{part.name}: linears that run as one must be alike, {first.name} is not")
        height, weight, scale = _height(part), part.weight.contiguous(), part.scale
        where = address(weight, "linear", part.name, weight.dtype, *weight.shape)
        owners.append(weight)
        if part.scheme is Scheme.FLOAT:
            parts[index] = Part(where, None, height)
            continue
        if scale is None or scale.numel() != height or scale.dtype != torch.float32:
            found = None if scale is None else f"{list(scale.shape)} {scale.dtype}"
            raise BackendError(f"{part.name}: scale {found}, not float32 [{height}, 1]")
        scale = scale.contiguous()
        scale_where = address(scale, "linear", f"scale of {part.name}", torch.float32, *scale.shape)
        parts[index] = Part(where, scale_where, height)
        owners.append(scale)
    weights = Weights(parts, len(groups), len(groups[0]), first.weight.shape[1], outputs, _dtype_code(first))
    return NativeLinear(weights, first.scheme is not Scheme.FLOAT, first.name, (parts, *owners))


def matrices_address(x: Tensor, operator: str, name: str, heads: int, a: int, b: int) -> int:
    """Of one float matrix a head, `[heads, a, b]`, whose rows or columns are contiguous."""
    if x.dtype not in _FLOATS:
        raise ValueError(f"{operator}: {name} is {x.dtype}; the native kernel takes {', '.join(map(str, _FLOATS))}")
    by_rows = x if x.stride(2) == 1 else x.transpose(1, 2)
    return rows_address(by_rows, operator, name, x.dtype, heads, *((a, b) if by_rows is x else (b, a)))


def _height(part: LinearPart) -> int:
    return part.weight.shape[0] * (2 if part.scheme is Scheme.W4A8 else 1)


def _outputs(group: Sequence[LinearPart]) -> int:
    return sum(_height(part) for part in group)


def _dtype_code(part: LinearPart) -> int:
    if part.weight.dim() != 2:
        raise BackendError(f"{part.name}: a weight of shape {list(part.weight.shape)} is no matrix")
    wanted = _FLOATS if part.scheme is Scheme.FLOAT else (torch.int8,)
    if part.weight.dtype not in wanted:
        raise BackendError(f"{part.name}: {part.scheme.value} weight of dtype {part.weight.dtype}")
    return INT4 if part.scheme is Scheme.W4A8 else DTYPES[part.weight.dtype]
