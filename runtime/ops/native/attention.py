"""Attention on native kernels: absorbed attention on NZ pages, a whole block in one call, decompressed attention."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ....native.pointers import address, output, rows_address
from ...attention.pools import LayerCache, Pool, StoredPool
from ..attention import LATENT, NO_SCALES, Attention
from ..handles import Activation, Mla, MlaConfig, MlaParts, MlaWeights, Quantized, own
from ..norms import Norms
from ..products import Products
from ..steps import Decode, Step
from ..weights import Weights
from .blocks import NativeMla, native_mla
from .cache import NativeCache, native_cache, native_heads
from .kernels import Kernels, contiguous_rows, gain
from .step import NativeStep, decode_arguments, lengths, native_step


class NativeAttention(Attention):
    """Attention in C. For cached prefixes, `torch` copies them out of the pages and merges the results.

    Raises ValueError for tensors that do not have the dtypes and sizes of their call.
    """

    def __init__(self, kernels: Kernels, weights: Weights, norms: Norms, products: Products, torch: Attention):
        super().__init__(kernels.dtype, weights, norms, products)
        self._call, self._code, self.torch = kernels.pool.call, kernels.dtype_code, torch
        self._last_step: NativeStep | None = None

    def zeros(self, pool: StoredPool, num_blocks: int, block_size: int) -> Tensor:
        return self.torch.zeros(pool, num_blocks, block_size)

    def new_cache(
        self, pools: Sequence[Pool], num_blocks: int, block_size: int, scales: Mapping[str, Tensor] = NO_SCALES
    ) -> LayerCache:
        return native_cache(super().new_cache(pools, num_blocks, block_size, scales))

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        out, to = output(self.dtype, tokens, heads, dim)
        self._call(
            "interleave_rope",
            rows_address(x, "interleave_rope", "x", self.dtype, tokens, heads, dim),
            self._code,
            x.stride(0),
            x.stride(1),
            tokens,
            heads,
            dim,
            address(cos, "interleave_rope", "cos", self.dtype, tokens, dim),
            address(sin, "interleave_rope", "sin", self.dtype, tokens, dim),
            to,
        )
        return out

    def kv_rmsnorm_rope_cache(
        self,
        kv: Tensor,
        gamma: Tensor,
        cos: Tensor,
        sin: Tensor,
        slots: Tensor,
        cache: LayerCache,
        eps: float,
        output_kv: bool,
    ) -> tuple[Tensor, Tensor] | None:
        kv, cos, sin, slots = contiguous_rows(kv), cos.contiguous(), sin.contiguous(), slots.contiguous()
        gamma, pages = gain(gamma, self.dtype), self._pages(cache)
        tokens, latent_dim, rope_dim = kv.shape[0], pages.latent_dim, pages.rope_dim
        rope, rope_to = output(self.dtype, tokens, rope_dim) if output_kv else (None, None)
        latent, latent_to = output(self.dtype, tokens, latent_dim) if output_kv else (None, None)
        self._call(
            "kv_cache_write",
            ctypes.byref(pages.struct),
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
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        k_nope: Tensor,
        k_rope: Tensor,
        value: Tensor,
        q_lens: Sequence[int],
        kv_lens: Sequence[int],
        scale: float,
        causal: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = [contiguous_rows(each) for each in (q_nope, q_rope, k_nope, k_rope[:, None], value)]
        heads = native_heads(self.dtype, *tensors)
        tokens, count = q_nope.shape[:2]
        sequences = len(q_lens)
        q_ends = lengths("attention", "q_lens", q_lens, sequences, tokens)
        kv_ends = lengths("attention", "kv_lens", kv_lens, sequences, k_nope.shape[0])
        out, to = output(self.dtype, tokens, count, value.shape[2])
        lse, lse_to = output(torch.float32, tokens, count, 1)
        self._call("attention", ctypes.byref(heads), q_ends, kv_ends, sequences, scale, causal, to, lse_to)
        return out, lse

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        q_latent, q_rope, pages = q_latent.contiguous(), q_rope.contiguous(), self._pages(cache)
        table, (tokens, heads) = decode.block_table.contiguous(), q_latent.shape[:2]
        out, to = output(self.dtype, tokens, heads, pages.latent_dim)
        self._call(
            "attention_paged",
            ctypes.byref(pages.struct),
            address(q_latent, "attention_paged", "q_latent", self.dtype, tokens, heads, pages.latent_dim),
            address(q_rope, "attention_paged", "q_rope", self.dtype, tokens, heads, pages.rope_dim),
            heads,
            *decode_arguments("attention_paged", decode, table, tokens),
            scale,
            to,
        )
        return out

    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        return self.torch.attention_update(outputs, lses)

    def mla(self, parts: MlaParts, config: MlaConfig) -> Mla:
        return native_mla(own(super().mla(parts, config), MlaWeights), self.dtype)

    def mla_prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized):
            return super().mla_prolog(hidden, mla, cache, step)
        hidden, shared, config = hidden.contiguous(), self._shared("mla_prolog", step), mla.config
        q_latent, latent_to = output(self.dtype, shared.tokens, config.heads, config.kv_lora_rank)
        q_rope, rope_to = output(self.dtype, shared.tokens, config.heads, config.qk_rope_head_dim)
        arguments = self._layer_arguments("mla_prolog", hidden, mla, cache, shared)
        self._call("mla_prolog", *arguments, latent_to, rope_to)
        return q_latent, q_rope

    def mla_decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> Tensor:
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized) or step.decode is None:
            return super().mla_decode(hidden, mla, cache, step)
        hidden, shared = hidden.contiguous(), self._shared("mla_decode", step)
        out, to = output(self.dtype, shared.tokens, mla.outputs)
        arguments = self._layer_arguments("mla_decode", hidden, mla, cache, shared)
        self._call("mla_decode", *arguments, *shared.decode, mla.config.softmax_scale, to)
        return out

    def _layer_arguments(
        self, operator: str, hidden: Tensor, mla: NativeMla, cache: LayerCache, shared: NativeStep
    ) -> tuple[object, ...]:
        """First arguments of `mla_prolog` and `mla_decode`. The caller keeps `hidden` alive."""
        pages = self._pages(cache)
        if pages.rope_dim != shared.rope_dim:
            raise ValueError(f"{operator}: cos has {shared.rope_dim} channels, the cache {pages.rope_dim}")
        return (
            ctypes.byref(mla.block),
            ctypes.byref(pages.struct),
            address(hidden, operator, "x", self.dtype, shared.tokens, mla.inputs),
            self._code,
            shared.tokens,
            *shared.rows,
        )

    def _shared(self, operator: str, step: Step) -> NativeStep:
        """Arguments of the step, checked once: all layers of a step share them."""
        shared = self._last_step
        if shared is None or shared.step is not step:
            shared = self._last_step = native_step(operator, step, self.dtype)
        return shared

    def _pages(self, cache: LayerCache) -> NativeCache:
        pages = native_cache(cache)
        if pages.dtype is not self.dtype:
            raise ValueError(f"kv cache: rope is {pages.dtype}; these operators compute in {self.dtype}")
        return pages
