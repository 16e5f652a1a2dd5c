"""Latent attention on native kernels: absorbed on pages, a whole block in one call, over decompressed keys."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....native.binding import DTYPES, Heads, LatentCache, Strided
from ....native.pointers import address, output, rows_address
from ...attention.pools import LayerCache
from ..handles import Activation, Keys, Mla, MlaConfig, MlaParts, MlaWeights, Quantized, Queries, RowParallel, own
from ..latent_attention import LATENT, ROPE, LatentAttention
from ..norms import Norms
from ..products import Products
from ..rotary import Rotary
from ..steps import Decode, Lengths, Positions, Step
from ..weights import Weights
from .blocks import NativeMla, native_mla
from .cache import NativeCache, native_cache
from .kernels import Kernels, contiguous_rows, gain
from .step import NativeStep, StepArguments, decode_arguments, lengths


class NativeLatentAttention(LatentAttention):
    """Attention in C. `torch` merges the results of cached prefixes.

    Raises ValueError for tensors that do not have the dtypes and sizes of their call.
    """

    absorbs_chunks = True

    def __init__(
        self,
        kernels: Kernels,
        weights: Weights,
        norms: Norms,
        products: Products,
        rotary: Rotary,
        torch: LatentAttention,
    ):
        super().__init__(kernels.dtype, weights, norms, products, rotary)
        self._call, self._code, self.torch = kernels.pool.call, kernels.dtype_code, torch
        self._steps = StepArguments(kernels.dtype)

    def kv_rmsnorm_rope_cache(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        kv, gamma, native = contiguous_rows(kv), gain(gamma, self.dtype), latent_cache(cache, self.dtype)
        cos, sin, slots = positions.cos.contiguous(), positions.sin.contiguous(), positions.slots.contiguous()
        tokens, latent_dim, rope_dim = kv.shape[0], native.latent_dim, native.rope_dim
        rope, rope_to = output(self.dtype, tokens, rope_dim) if output_kv else (None, None)
        latent, latent_to = output(self.dtype, tokens, latent_dim) if output_kv else (None, None)
        self._call(
            "kv_cache_write",
            ctypes.byref(native.struct),
            rows_address(kv, "kv_cache_write", "kv", self.dtype, tokens, latent_dim + rope_dim),
            kv.stride(0),
            address(gamma, "kv_cache_write", "gamma", self.dtype, latent_dim),
            address(cos, "kv_cache_write", "cos", self.dtype, tokens, rope_dim),
            address(sin, "kv_cache_write", "sin", self.dtype, tokens, rope_dim),
            address(slots, "kv_cache_write", "slots", torch.int64, tokens),
            tokens,
            eps,
            rope_to,
            latent_to,
        )
        if rope is None or latent is None:
            return None
        return rope, cache[LATENT].rounded(latent)

    def fused_infer_attention(
        self, queries: Queries, keys: Keys, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor]:
        queries = Queries(*map(contiguous_rows, queries))
        keys = Keys(contiguous_rows(keys.nope), contiguous_rows(keys.rope[:, None]), contiguous_rows(keys.value))
        heads = _heads(self.dtype, queries, keys)
        tokens, count = queries.nope.shape[:2]
        ends = _ends(lengths, tokens, keys.nope.shape[0])
        out, to = output(self.dtype, tokens, count, keys.value.shape[2])
        lse, lse_to = output(torch.float32, tokens, count, 1)
        self._call("attention", ctypes.byref(heads), *ends, scale, lengths.causal, to, lse_to)
        return out, lse

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        q_latent, q_rope, native = q_latent.contiguous(), q_rope.contiguous(), latent_cache(cache, self.dtype)
        table, (tokens, heads) = decode.block_table.contiguous(), q_latent.shape[:2]
        out, to = output(self.dtype, tokens, heads, native.latent_dim)
        self._call(
            "attention_paged",
            ctypes.byref(native.struct),
            address(q_latent, "attention_paged", "q_latent", self.dtype, tokens, heads, native.latent_dim),
            address(q_rope, "attention_paged", "q_rope", self.dtype, tokens, heads, native.rope_dim),
            heads,
            *decode_arguments("attention_paged", decode, table, tokens),
            scale,
            to,
        )
        return out

    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        return self.torch.attention_update(outputs, lses)

    def load(self, parts: MlaParts, config: MlaConfig) -> Mla:
        return native_mla(own(super().load(parts, config), MlaWeights), self.dtype)

    def prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized):
            return super().prolog(hidden, mla, cache, step)
        hidden, shared, config = hidden.contiguous(), self._steps.of("mla_prolog", step), mla.config
        q_latent, latent_to = output(self.dtype, shared.tokens, config.heads, config.kv_lora_rank)
        q_rope, rope_to = output(self.dtype, shared.tokens, config.heads, config.qk_rope_head_dim)
        arguments = self._layer_arguments("mla_prolog", hidden, mla, cache, shared)
        self._call("mla_prolog", *arguments, latent_to, rope_to)
        return q_latent, q_rope

    def decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> Tensor:
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized) or step.decode is None:
            return super().decode(hidden, mla, cache, step)
        hidden, shared = hidden.contiguous(), self._steps.of("mla_decode", step)
        out, to = output(self.dtype, shared.tokens, mla.outputs)
        arguments = self._layer_arguments("mla_decode", hidden, mla, cache, shared)
        self._call("mla_decode", *arguments, *shared.decode, mla.config.softmax_scale, to)
        return self.products.row_parallel(out, mla.o) if isinstance(mla.o, RowParallel) else out

    def _layer_arguments(
        self, operator: str, hidden: Tensor, mla: NativeMla, cache: LayerCache, shared: NativeStep
    ) -> tuple[object, ...]:
        """First arguments of `mla_prolog` and `mla_decode`. The caller keeps `hidden` alive."""
        native = latent_cache(cache, self.dtype)
        if native.rope_dim != shared.rope_dim:
            raise ValueError(f"{operator}: cos has {shared.rope_dim} channels, the cache {native.rope_dim}")
        return (
            ctypes.byref(mla.block),
            ctypes.byref(native.struct),
            address(hidden, operator, "x", self.dtype, shared.tokens, mla.inputs),
            self._code,
            shared.tokens,
            *shared.rows,
        )


@dataclass(frozen=True)
class NativeLatentCache:
    """The struct of a latent cache. dtype: of the rope pool. latent_dim and rope_dim count channels."""

    struct: LatentCache
    dtype: torch.dtype
    latent_dim: int
    rope_dim: int


def latent_cache(cache: LayerCache, dtype: torch.dtype) -> NativeLatentCache:
    """The struct of a cache's latent and rope. Raises ValueError for a rope in another compute dtype than `dtype`."""
    native = native_cache(cache).once(_latent_cache)
    if native.dtype is not dtype:
        raise ValueError(f"kv cache: rope is {native.dtype}; these operators compute in {dtype}")
    return native


def _latent_cache(cache: NativeCache) -> NativeLatentCache:
    """The struct of a cache's latent and rope. Raises ValueError for pools that do not belong together."""
    latent, rope = cache[LATENT].pool, cache[ROPE].pool
    if rope.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"kv cache: rope is {rope.dtype}; the native kernels take float32 and bfloat16")
    if latent.dtype not in (rope.dtype, torch.int8):
        raise ValueError(f"kv cache: latent is {latent.dtype} and rope {rope.dtype}; the native kernels take one dtype")
    struct = LatentCache(cache.structs[LATENT], cache.structs[ROPE])
    if struct.rope.blocks != struct.latent.blocks:
        raise ValueError(f"kv cache: rope has {struct.rope.blocks} blocks, latent {struct.latent.blocks}")
    if rope.layout != latent.layout:
        raise ValueError(f"kv cache: rope has {rope.layout} layout, latent {latent.layout}")
    return NativeLatentCache(struct, rope.dtype, latent.channels, rope.channels)


def _ends(these: Lengths, tokens: int, keys: int) -> tuple[object, ...]:
    sequences = len(these.q_lens)
    return (
        lengths("attention", "q_lens", these.q_lens, sequences, tokens),
        lengths("attention", "kv_lens", these.kv_lens, sequences, keys),
        sequences,
    )


def _heads(dtype: torch.dtype, queries: Queries, keys: Keys) -> Heads:
    """Struct of queries and keys with contiguous channels; keys.rope `[S, 1, D]`."""
    (tokens, heads, nope), rope = queries.nope.shape, queries.rope.shape[-1]
    count, width = keys.nope.shape[0], keys.value.shape[-1]

    def strided(name: str, x: Tensor, *shape: int) -> Strided:
        start = rows_address(x, "attention", name, dtype, *shape)
        return Strided(start, x.stride(0), x.stride(1) if shape[1] > 1 else 0)

    return Heads(
        strided("q_nope", queries.nope, tokens, heads, nope),
        strided("q_rope", queries.rope, tokens, heads, rope),
        strided("k_nope", keys.nope, count, heads, nope),
        strided("k_rope", keys.rope, count, 1, rope),
        strided("value", keys.value, count, heads, width),
        heads,
        nope,
        rope,
        width,
        DTYPES[dtype],
    )
