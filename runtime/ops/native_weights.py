"""Stored weights and caches as the native kernels take them: by address, beside what keeps the memory behind it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ...errors import BackendError
from ...quant.native import DTYPES, INT4, Cache, Heads, MlaBlock, MoeBlock, Part, Strided, Weights
from ...quant.schemes import Scheme
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


def native_mla(handle: MlaWeights) -> MlaWeights:
    """The handle with its block; as it is where its linears are not all the kernels' own, or not fused."""
    q_b, w_uk, w_uv = handle.q_b, handle.w_uk, handle.w_uv
    linears = [*handle.qkv_a, handle.o, *([] if q_b is None else [q_b])]
    if len(handle.qkv_a) != 1 or not all(isinstance(linear, NativeLinear) for linear in linears):
        return handle
    if 1 not in w_uk.stride()[1:] or 1 not in w_uv.stride()[1:]:
        return handle
    strides = ctypes.c_int64 * 3
    block = MlaBlock(
        qkv_a=handle.qkv_a[0].pointer,
        q_b=None if q_b is None else q_b.pointer,
        o=handle.o.pointer,
        q_a_norm=None if handle.q_a_norm is None else handle.q_a_norm.data_ptr(),
        kv_a_norm=handle.kv_a_norm.data_ptr(),
        w_uk=w_uk.data_ptr(),
        w_uv=w_uv.data_ptr(),
        w_uk_strides=strides(*w_uk.stride()),
        w_uv_strides=strides(*w_uv.stride()),
        heads=handle.config.num_heads,
        nope_dim=handle.config.qk_nope_head_dim,
        value_dim=handle.config.v_head_dim,
        kv_b_dtype=DTYPES[w_uk.dtype],
        eps=handle.config.rms_norm_eps,
    )
    return NativeMla(**{each.name: getattr(handle, each.name) for each in fields(MlaWeights)}, block=block)


def native_moe(weights: MoeWeights, shared: MlpWeights | None) -> MoeBlock | None:
    """A layer's experts as one call takes them; None where its linears are not all the kernels' own."""
    linears = [weights.router, weights.gate_up, weights.down]
    linears += [] if shared is None else [shared.gate_up, shared.down]
    if not all(isinstance(linear, NativeLinear) for linear in linears):
        return None
    names = ("router", "gate_up", "down", "shared_gate_up", "shared_down")
    gating, bias = weights.gating, weights.correction_bias
    return MoeBlock(
        **{name: linear.pointer for name, linear in zip(names, linears, strict=False)},
        bias=None if bias is None else bias.data_ptr(),
        k=gating.k,
        groups=gating.group_count,
        top_groups=gating.k_group,
        sigmoid=gating.scoring == "sigmoid",
        select_two=gating.group_select_mode,
        renormalize=gating.renormalize,
        scaling=gating.scaling,
    )


def native_cache(cache: LayerCache) -> Cache:
    channels = cache.latent.shape[1] * cache.latent.shape[3], cache.rope.shape[1] * cache.rope.shape[3]
    scale = cache.latent_scale
    return Cache(
        cache.latent.data_ptr(),
        cache.rope.data_ptr(),
        cache.block_size,
        *channels,
        None if scale is None else scale.data_ptr(),
        DTYPES[cache.rope.dtype],
    )


def native_heads(q_nope: Tensor, q_rope: Tensor, k_nope: Tensor, k_rope: Tensor, value: Tensor) -> Heads:
    """Tensors `[tokens, heads, channels]` whose channels lie together; k_rope has one head for all."""

    def strided(x: Tensor) -> Strided:
        return Strided(x.data_ptr(), x.stride(0), x.stride(1) if x.shape[1] > 1 else 0)

    return Heads(
        *(strided(each) for each in (q_nope, q_rope, k_nope, k_rope, value)),
        q_nope.shape[1],
        q_nope.shape[2],
        q_rope.shape[2],
        value.shape[2],
        DTYPES[q_nope.dtype],
    )


def native_linear(groups: Sequence[Sequence[LinearPart]]) -> NativeLinear:
    """Groups of parts, the same count in each, fused along their outputs.

    Raises BackendError where their shapes, dtypes or schemes do not allow it.
    """
    first = groups[0][0]
    owners: list[Tensor] = []
    parts = (Part * (len(groups) * len(groups[0])))()
    outputs = _outputs(groups[0])
    for index, part in enumerate(part for group in groups for part in group):
        if (part.scheme, part.weight.dtype, part.weight.shape[1]) != (
            first.scheme,
            first.weight.dtype,
            first.weight.shape[1],
        ):
            raise BackendError(f"{part.name}: linears that run as one must be alike, {first.name} is not")
        weight = part.weight.contiguous()
        scale = None if part.scale is None else part.scale.contiguous()
        if scale is not None and (scale.numel() != _height(part) or scale.dtype != torch.float32):
            raise BackendError(
                f"{part.name}: scale {list(scale.shape)} {scale.dtype}, not float32 [{_height(part)}, 1]"
            )
        parts[index] = Part(weight.data_ptr(), None if scale is None else scale.data_ptr(), _height(part))
        owners += [weight] if scale is None else [weight, scale]
    for group in groups:
        if len(group) != len(groups[0]) or _outputs(group) != outputs:
            raise BackendError(f"{group[0].name}: the experts of a layer must have one shape")
    weights = Weights(parts, len(groups), len(groups[0]), first.weight.shape[1], outputs, _dtype_code(first))
    return NativeLinear(weights, first.scheme is not Scheme.FLOAT, first.name, (parts, *owners))


def _height(part: LinearPart) -> int:
    return part.weight.shape[0] * (2 if part.scheme is Scheme.W4A8 else 1)


def _outputs(group: Sequence[LinearPart]) -> int:
    return sum(_height(part) for part in group)


def _dtype_code(part: LinearPart) -> int:
    if part.scheme is Scheme.W4A8:
        return INT4
    wanted = _FLOATS if part.scheme is Scheme.FLOAT else (torch.int8,)
    if part.weight.dtype not in wanted:
        raise BackendError(f"{part.name}: {part.scheme.value} weight of dtype {part.weight.dtype}")
    return DTYPES[part.weight.dtype]
