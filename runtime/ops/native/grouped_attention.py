"""Grouped-query attention on native kernels: rows before attention, attention, and a whole block in one call."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, fields
from itertools import pairwise

import torch
from torch import Tensor

from ....native.binding import GqaBlock, KvCache
from ....native.pointers import address, output, rows_address
from ...attention.pools import LayerCache
from ..grouped_attention import KEY, VALUE, Gqa, GqaConfig, GqaParts, GroupedAttention
from ..handles import Activation, Quantized, RowParallel, own
from ..norms import Norms
from ..products import Products
from ..rotary import Rotary
from ..steps import Decode, Lengths, Positions, Step
from ..weights import Weights
from .cache import NativeCache, native_cache
from .kernels import Kernels
from .step import StepArguments, decode_arguments, lengths, row_arguments
from .weights import NativeLinear


@dataclass(frozen=True)
class NativeGqa(Gqa):
    """Default handle with `block`, its struct for native calls.

    one_call: the struct has all linears, so that a decode step is one call. inputs, outputs: of that call.
    """

    block: GqaBlock = field(repr=False)
    one_call: bool
    inputs: int
    outputs: int


class NativeGroupedAttention(GroupedAttention):
    """Attention in C. Raises ValueError for tensors that do not have the dtypes and sizes of their call."""

    def __init__(self, kernels: Kernels, weights: Weights, norms: Norms, products: Products, rotary: Rotary):
        super().__init__(kernels.dtype, weights, norms, products, rotary)
        self._call, self._code = kernels.pool.call, kernels.dtype_code
        self._steps = StepArguments(kernels.dtype)

    def scatter_pa_kv_cache(self, key: Tensor, value: Tensor, cache: LayerCache, slots: Tensor) -> None:
        cache[KEY].write(slots, key.flatten(1))
        cache[VALUE].write(slots, value.flatten(1))

    def fused_infer_attention(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, scale: float
    ) -> Tensor:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        (tokens, heads, width), (keys, kv_heads) = query.shape, key.shape[:2]
        out, to = output(self.dtype, tokens, heads, width)
        self._call(
            "grouped_attention",
            address(query, "grouped_attention", "query", self.dtype, tokens, heads, width),
            address(key, "grouped_attention", "key", self.dtype, keys, kv_heads, width),
            address(value, "grouped_attention", "value", self.dtype, keys, kv_heads, width),
            self._code,
            heads,
            kv_heads,
            width,
            *_lengths(lengths, tokens, keys),
            keys,
            scale,
            lengths.causal,
            to,
        )
        return out

    def fused_infer_attention_paged(self, query: Tensor, cache: LayerCache, decode: Decode, scale: float) -> Tensor:
        query, table, struct = query.contiguous(), decode.block_table.contiguous(), kv_cache(cache, self.dtype)
        tokens, heads, width = query.shape
        out, to = output(self.dtype, tokens, heads, width)
        self._call(
            "grouped_attention_paged",
            ctypes.byref(struct),
            address(query, "grouped_attention_paged", "query", self.dtype, tokens, heads, width),
            self._code,
            heads,
            struct.key.channels // width,
            width,
            *decode_arguments("grouped_attention_paged", decode, table, tokens),
            scale,
            to,
        )
        return out

    def load(self, parts: GqaParts, config: GqaConfig) -> Gqa:
        return native_gqa(super().load(parts, config), self.dtype)

    def project(self, hidden: Activation, gqa: Gqa, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        return self._rows(hidden, own(gqa, NativeGqa), positions, None)

    def write(
        self, hidden: Activation, gqa: Gqa, cache: LayerCache, positions: Positions
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self._rows(hidden, own(gqa, NativeGqa), positions, kv_cache(cache, self.dtype))
        return query, *self.as_cached(key, value, cache)

    def decode(self, hidden: Activation, gqa: Gqa, cache: LayerCache, step: Step) -> Tensor:
        native = own(gqa, NativeGqa)
        if not native.one_call or isinstance(hidden, Quantized):
            return super().decode(hidden, gqa, cache, step)
        hidden, shared, struct = hidden.contiguous(), self._steps.of("gqa_decode", step), kv_cache(cache, self.dtype)
        self._check_rope("gqa_decode", native, shared.rope_dim)
        out, to = output(self.dtype, shared.tokens, native.outputs)
        self._call(
            "gqa_decode",
            ctypes.byref(native.block),
            ctypes.byref(struct),
            address(hidden, "gqa_decode", "x", self.dtype, shared.tokens, native.inputs),
            self._code,
            shared.tokens,
            *shared.rows,
            *shared.decode,
            native.config.softmax_scale,
            to,
        )
        return self.products.row_parallel(out, gqa.o) if isinstance(gqa.o, RowParallel) else out

    def _rows(
        self, hidden: Activation, gqa: NativeGqa, positions: Positions, cache: KvCache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Project, norm, rotate; write keys and values into a cache, if there is one."""
        products = self.products.linears(hidden, gqa.qkv)
        qkv = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        config, tokens = gqa.config, qkv.shape[0]
        width = (config.heads + 2 * config.kv_heads) * config.head_dim
        rope_dim, rows, kept = row_arguments("gqa_rows", positions, self.dtype)
        self._check_rope("gqa_rows", gqa, rope_dim)
        (query, q), (key, k), (value, v) = (
            output(self.dtype, tokens, heads, config.head_dim)
            for heads in (config.heads, config.kv_heads, config.kv_heads)
        )
        self._call(
            "gqa_rows",
            ctypes.byref(gqa.block),
            None if cache is None else ctypes.byref(cache),
            rows_address(qkv, "gqa_rows", "qkv", self.dtype, tokens, width),
            self._code,
            qkv.stride(0),
            tokens,
            *rows,
            q,
            k,
            v,
        )
        del kept  # until here
        return query, key, value

    def _check_rope(self, operator: str, gqa: NativeGqa, rope_dim: int) -> None:
        if rope_dim != gqa.config.rope_dim:
            raise ValueError(f"{operator}: cos has {rope_dim} channels, the layer rotates {gqa.config.rope_dim}")


def native_gqa(handle: Gqa, dtype: torch.dtype) -> NativeGqa:
    """Add the struct to a handle. Raises ValueError for widths that are not those of the handle's config."""
    config, qkv = handle.config, handle.qkv[0]
    width = (config.heads + 2 * config.kv_heads) * config.head_dim
    values = config.heads * config.head_dim
    o = None if isinstance(handle.o, RowParallel) else handle.o
    one_call = len(handle.qkv) == 1 and isinstance(qkv, NativeLinear) and isinstance(o, NativeLinear | None)
    qkv_struct, o_struct = (linear if one_call and isinstance(linear, NativeLinear) else None for linear in (qkv, o))
    found = {
        "outputs of q, k and v": (width if qkv_struct is None else qkv_struct.weights.outputs, width),
        "inputs of o": (_inputs(handle, o_struct, values), values),
    }
    for what, (got, expected) in found.items():
        if got != expected:
            raise ValueError(f"gqa: {got} {what}; the layer's config says {expected}")

    def gain(name: str, tensor: Tensor | None, *shape: int) -> int | None:
        return None if tensor is None else address(tensor, "gqa", name, dtype, *shape)

    block = GqaBlock(
        qkv=None if qkv_struct is None else qkv_struct.pointer,
        o=None if o_struct is None else o_struct.pointer,
        bias=gain("bias", handle.bias, width),
        q_norm=gain("q_norm", handle.q_norm, config.head_dim),
        k_norm=gain("k_norm", handle.k_norm, config.head_dim),
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        rope_dim=config.rope_dim,
        eps=config.rms_norm_eps,
    )
    return NativeGqa(
        **{each.name: getattr(handle, each.name) for each in fields(Gqa)},
        block=block,
        one_call=one_call,
        inputs=0 if qkv_struct is None else qkv_struct.weights.cols,
        outputs=values if o_struct is None else o_struct.weights.outputs,
    )


def _inputs(handle: Gqa, o: NativeLinear | None, values: int) -> int:
    if isinstance(handle.o, RowParallel):
        return len(handle.o.inputs.own)
    return values if o is None else o.weights.cols


def kv_cache(cache: LayerCache, dtype: torch.dtype) -> KvCache:
    """The struct of a cache's keys and values. Raises ValueError for pools that do not belong together."""
    native = native_cache(cache)
    struct = native.once(_kv_cache)
    for name in (KEY, VALUE):
        if native[name].pool.dtype not in (dtype, torch.int8):
            raise ValueError(f"kv cache: {name} is {native[name].pool.dtype}; these operators compute in {dtype}")
    return struct


def _kv_cache(cache: NativeCache) -> KvCache:
    struct = KvCache(cache.structs[KEY], cache.structs[VALUE])
    for what in ("blocks", "channels"):
        key, value = getattr(struct.key, what), getattr(struct.value, what)
        if key != value:
            raise ValueError(f"kv cache: {KEY} has {key} {what}, {VALUE} {value}")
    return struct


def _lengths(these: Lengths, tokens: int, keys: int) -> tuple[object, ...]:
    count, ends = len(these.q_lens), [0, *these.kv_lens]
    if ends[-1] != keys:
        raise ValueError(f"grouped_attention: kv_lens end at {ends[-1]}, and there are {keys} keys")
    each = [stop - start for start, stop in pairwise(ends)]
    return (
        lengths("grouped_attention", "q_lens", these.q_lens, count, tokens),
        lengths("grouped_attention", "kv_lens", each, count),
        count,
    )
