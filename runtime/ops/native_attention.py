"""Native kernels' side of the CPU's operators: the paged cache, attention, and its whole block in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from ...quant.kv_cache import cached_latent
from . import Activation, Decode, LayerCache, Mla, MlaConfig, MlaParts, Quantized, Step
from .native_products import NativeProducts, contiguous_rows
from .native_weights import NativeMla, native_cache, native_heads, native_mla


class NativeAttention(NativeProducts):
    """Latent attention on NZ pages, and attention over decompressed keys."""

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        x = x if x.stride(2) == 1 else x.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        out = torch.empty(tokens, heads, dim, dtype=self.dtype)
        self.pool.call(
            "interleave_rope",
            x.data_ptr(),
            self._code,
            x.stride(0),
            x.stride(1),
            tokens,
            heads,
            dim,
            cos.data_ptr(),
            sin.data_ptr(),
            out.data_ptr(),
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
        gamma = gamma.to(self.dtype).contiguous()
        tokens, latent_dim, rope_dim = kv.shape[0], gamma.shape[0], cos.shape[-1]
        rope = torch.empty(tokens, rope_dim, dtype=self.dtype) if output_kv else None
        latent = torch.empty(tokens, latent_dim, dtype=self.dtype) if output_kv else None
        self.pool.call(
            "kv_cache_write",
            ctypes.byref(native_cache(cache)),
            kv.data_ptr(),
            kv.stride(0),
            gamma.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            tokens,
            eps,
            None if rope is None else rope.data_ptr(),
            None if latent is None else latent.data_ptr(),
        )
        if rope is None or latent is None:
            return None
        return rope, latent if cache.latent_scale is None else cached_latent(latent, cache.latent_scale)

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
        heads = native_heads(*tensors)
        sequences, tokens, count = len(q_lens), q_nope.shape[0], q_nope.shape[1]
        lengths = ctypes.c_int64 * sequences
        out, lse = torch.empty(tokens, count, value.shape[2], dtype=self.dtype), torch.empty(tokens, count, 1)
        self.pool.call(
            "attention",
            ctypes.byref(heads),
            lengths(*q_lens),
            lengths(*kv_lens),
            sequences,
            scale,
            causal,
            out.data_ptr(),
            lse.data_ptr(),
        )
        return out, lse

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        q_latent, q_rope, table = q_latent.contiguous(), q_rope.contiguous(), decode.block_table
        sequences = len(decode.q_lens)
        lengths = ctypes.c_int64 * sequences
        out = torch.empty_like(q_latent)
        self.pool.call(
            "attention_paged",
            ctypes.byref(native_cache(cache)),
            q_latent.data_ptr(),
            q_rope.data_ptr(),
            q_latent.shape[1],
            lengths(*decode.q_lens),
            lengths(*decode.kv_lens),
            sequences,
            table.data_ptr(),
            table.stride(0),
            scale,
            out.data_ptr(),
        )
        return out

    # ---- composites: several operators a call, of the same results -------------------------------------------------

    def mla(self, parts: MlaParts, config: MlaConfig) -> Mla:
        return native_mla(super().mla(parts, config))

    def mla_prolog(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> tuple[Tensor, Tensor]:
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized):
            return super().mla_prolog(hidden, mla, cache, step)
        hidden, cos, sin, slots = (each.contiguous() for each in (hidden, step.cos, step.sin, step.slots))
        tokens, config = hidden.shape[0], mla.config
        q_latent = torch.empty(tokens, config.num_heads, config.kv_lora_rank, dtype=self.dtype)
        q_rope = torch.empty(tokens, config.num_heads, config.qk_rope_head_dim, dtype=self.dtype)
        self.pool.call(
            "mla_prolog",
            ctypes.byref(mla.block),
            ctypes.byref(native_cache(cache)),
            hidden.data_ptr(),
            self._code,
            tokens,
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            q_latent.data_ptr(),
            q_rope.data_ptr(),
        )
        return q_latent, q_rope

    def mla_decode(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step, scale: float) -> Tensor:
        decode = step.decode
        if not isinstance(mla, NativeMla) or isinstance(hidden, Quantized) or decode is None:
            return super().mla_decode(hidden, mla, cache, step, scale)
        hidden, cos, sin, slots = (each.contiguous() for each in (hidden, step.cos, step.sin, step.slots))
        sequences = len(decode.q_lens)
        lengths = ctypes.c_int64 * sequences
        out = torch.empty(hidden.shape[0], mla.o.weights.outputs, dtype=self.dtype)
        self.pool.call(
            "mla_decode",
            ctypes.byref(mla.block),
            ctypes.byref(native_cache(cache)),
            hidden.data_ptr(),
            self._code,
            hidden.shape[0],
            cos.data_ptr(),
            sin.data_ptr(),
            slots.data_ptr(),
            lengths(*decode.q_lens),
            lengths(*decode.kv_lens),
            sequences,
            decode.block_table.data_ptr(),
            decode.block_table.stride(0),
            scale,
            out.data_ptr(),
        )
        return out
