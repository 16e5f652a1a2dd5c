"""Structs for one native call a layer: attention weights, and experts with their router."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ....native.binding import DTYPES, MlaBlock, MoeBlock
from ....native.pointers import address
from ..handles import MlaWeights, MoeWeights, RowParallel
from .weights import NativeLinear, matrices_address


@dataclass(frozen=True)
class NativeMla(MlaWeights):
    """Default handle with `block`, its struct for native calls. inputs, outputs: numbers of channels.

    Where ranks divide the heads, native calls end before the output projection: the outputs are the heads' values.
    """

    block: MlaBlock = field(repr=False)
    inputs: int
    outputs: int


@dataclass(frozen=True)
class NativeMoe(MoeWeights):
    """Default handle with `block`, its struct for native calls. inputs, outputs: numbers of channels."""

    block: MoeBlock = field(repr=False, kw_only=True)
    inputs: int = field(kw_only=True)
    outputs: int = field(kw_only=True)


def native_mla(handle: MlaWeights, dtype: torch.dtype) -> MlaWeights:
    """Add the struct to a handle. Unchanged if its linears are not all native, or not fused.

    `dtype` is the compute dtype. Raises ValueError for widths that are not those of the handle's config.
    """
    qkv_a, q_b, w_uk, w_uv = handle.qkv_a[0], handle.q_b, handle.w_uk, handle.w_uv
    o = None if isinstance(handle.o, RowParallel) else handle.o
    if len(handle.qkv_a) != 1 or not isinstance(qkv_a, NativeLinear):
        return handle
    if not isinstance(q_b, NativeLinear | None) or not isinstance(o, NativeLinear | None):
        return handle
    if 1 not in w_uk.stride()[1:] or 1 not in w_uv.stride()[1:]:
        return handle
    config, q_a_norm, q_a_width = handle.config, handle.q_a_norm, _check_mla(handle, qkv_a, q_b, o)
    heads, latent = config.heads, config.kv_lora_rank
    strides = ctypes.c_int64 * 3
    block = MlaBlock(
        qkv_a=qkv_a.pointer,
        q_b=None if q_b is None else q_b.pointer,
        o=None if o is None else o.pointer,
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
    outputs = heads * config.v_head_dim if o is None else o.weights.outputs
    widths = {"inputs": qkv_a.weights.cols, "outputs": outputs}
    return NativeMla(**{each.name: getattr(handle, each.name) for each in fields(MlaWeights)}, block=block, **widths)


def _check_mla(handle: MlaWeights, qkv_a: NativeLinear, q_b: NativeLinear | None, o: NativeLinear | None) -> int:
    """Compare the widths of a layer's linears with its config: returns the width of q_a."""
    config = handle.config
    q_width, values = config.heads * config.qk_head_dim, config.heads * config.v_head_dim
    q_a_width = q_width if q_b is None else q_b.weights.cols
    widths = {
        "outputs of q_a and kv_a": (qkv_a.weights.outputs, q_a_width + config.kv_lora_rank + config.qk_rope_head_dim),
        "outputs of q_b": (q_width if q_b is None else q_b.weights.outputs, q_width),
        "inputs of o": (len(handle.o.inputs.own) if isinstance(handle.o, RowParallel) else _inputs(o), values),
    }
    for what, (found, expected) in widths.items():
        if found != expected:
            raise ValueError(f"mla: {found} {what}; the layer's config says {expected}")
    if (q_b is None) != (handle.q_a_norm is None):
        raise ValueError("mla: q_b and q_a_norm come together")
    if handle.w_uk.dtype is not handle.w_uv.dtype:
        raise ValueError(f"mla: w_uk is {handle.w_uk.dtype} and w_uv {handle.w_uv.dtype}; the kernel takes one dtype")
    return q_a_width


def _inputs(linear: NativeLinear | None) -> int:
    return 0 if linear is None else linear.weights.cols


def native_moe(weights: MoeWeights) -> MoeWeights:
    """Add the struct to a handle. Unchanged if its linears are not all native, or ranks divide the experts."""
    router, gate_up, down, shared = weights.router, weights.gate_up, weights.down, weights.shared
    if weights.ranks > 1:
        return weights
    if not (isinstance(router, NativeLinear) and isinstance(gate_up, NativeLinear) and isinstance(down, NativeLinear)):
        return weights
    shared_gate_up, shared_down = (None, None) if shared is None else (shared.gate_up, shared.down)
    if not isinstance(shared_gate_up, NativeLinear | None) or not isinstance(shared_down, NativeLinear | None):
        return weights
    gating = weights.gating
    block = MoeBlock(
        router=router.pointer,
        gate_up=gate_up.pointer,
        down=down.pointer,
        shared_gate_up=None if shared_gate_up is None else shared_gate_up.pointer,
        shared_down=None if shared_down is None else shared_down.pointer,
        bias=bias_address(weights.correction_bias, "moe_layer", router.weights.outputs),
        k=gating.k,
        groups=gating.group_count,
        top_groups=gating.k_group,
        sigmoid=gating.scoring == "sigmoid",
        select_two=gating.group_select_mode,
        renormalize=gating.renormalize,
        scaling=gating.scaling,
    )
    widths = {"inputs": gate_up.weights.cols, "outputs": down.weights.outputs}
    return NativeMoe(**{each.name: getattr(weights, each.name) for each in fields(MoeWeights)}, block=block, **widths)


def bias_address(bias: Tensor | None, operator: str, experts: int) -> int | None:
    """Address of a router's bias, float32 `[experts]`, or None without one."""
    return None if bias is None else address(bias, operator, "bias", torch.float32, experts)
