"""The int8 latent cache on torch_npu: written in plain steps, read by attention in full int8.

`npu_fused_infer_attention_score_v2` wants queries, keys and values all int8, one scale a tensor for keys and for
values, and rope in bfloat16. The channels' scales therefore go into the queries before it and into its result after
it, and keys and values have the scale 1. No operator writes an int8 latent beside a bfloat16 rope with a scale a
channel: `npu_kv_rmsnorm_rope_cache` quantizes both caches or none, and `npu_mla_prolog_v3` would be of use to decoding
steps only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import BackendError
from ...formats.kv_cache import INT8_CHANNELS
from ..layout import CHANNELS
from . import Decode, LayerCache, PrefixSegment
from .ascend_attention import NO_MASK, RIGHT_DOWN_CAUSAL, AscendAttention

PER_TOKEN_HEAD, PER_TENSOR = 3, 0  # quant modes of queries, and of keys and values
# A query of zeros has the scale 0, and its rope part is divided by the scale.
_LEAST_SCALE = 1e-30


class AscendInt8Cache(AscendAttention):
    """Attention of the Ascend set, on caches of either kind."""

    _one: Tensor  # float32 [1]

    @property
    def has_int8_cache(self) -> bool:
        return self.kv_layout == "nz" and self.dtype != torch.float16

    def _int8_cache(
        self, scales: Sequence[Tensor], num_blocks: int, block_size: int, rope_dim: int
    ) -> tuple[LayerCache, ...]:
        if not self.has_int8_cache:
            raise BackendError(
                "the NPU's attention reads an int8 KV cache in NZ pages and computes in bfloat16 then: "
                "leave kv_layout and dtype as they are, or the KV cache in the compute dtype"
            )

        def pool(channels: int, tile: int, dtype: torch.dtype) -> Tensor:
            # One block more, which is nobody's: the slot −1 of tokens that are not cached lies in it.
            shape = (num_blocks + 1, channels // tile, block_size, tile)
            return torch.zeros(shape, dtype=dtype, device=self.device)

        return tuple(
            LayerCache(
                pool(scale.shape[0], INT8_CHANNELS, torch.int8),
                pool(rope_dim, CHANNELS, self.dtype),
                block_size,
                scale.to(self.device, self.dtype),
            )
            for scale in scales
        )

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
        scale = cache.latent_scale
        if scale is None:
            return super().kv_rmsnorm_rope_cache(kv, gamma, cos, sin, slots, cache, eps, output_kv)
        latent, k_rope = kv.split([gamma.shape[0], cos.shape[-1]], dim=-1)
        latent = self.rms_norm(latent, gamma, eps)
        k_rope = self.interleave_rope(k_rope.unsqueeze(1), cos, sin).squeeze(1)
        codes = self._npu.npu_quantize(latent, scale, None, torch.qint8, -1)
        block, offset = slots // cache.block_size, slots % cache.block_size
        cache.latent[block, :, offset] = codes.unflatten(-1, (-1, INT8_CHANNELS))
        cache.rope[block, :, offset] = k_rope.unflatten(-1, (-1, CHANNELS))
        return (k_rope, codes * scale) if output_kv else None

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        channel_scale = cache.latent_scale
        if channel_scale is None:
            return super().fused_infer_attention_paged(q_latent, q_rope, cache, decode, scale)
        tokens, heads, width = q_latent.shape
        query = self.dynamic_quant(q_latent.flatten(0, 1), channel_scale)
        query_scale = query.scale.clamp_min(_LEAST_SCALE).view(tokens, heads)
        # The operator multiplies both parts of a score by the query's scale.
        rope = (q_rope / query_scale.unsqueeze(-1)).to(self.dtype)
        codes = query.codes.view(tokens, heads, width)
        single = tokens == len(decode.q_lens)
        if single:  # a batch of one query each: nothing to mask
            codes, rope, query_scale = (each.unsqueeze(1) for each in (codes, rope, query_scale))
        latent = cache.latent.unsqueeze(1)
        out = self._npu.npu_fused_infer_attention_score_v2(
            codes,
            latent,
            latent,
            query_rope=rope,
            key_rope=cache.rope.unsqueeze(1),
            atten_mask=None if single else self._causal_mask,
            sparse_mode=NO_MASK if single else RIGHT_DOWN_CAUSAL,
            actual_seq_qlen=None if single else list(decode.q_lens),
            actual_seq_kvlen=list(decode.kv_lens),
            block_table=decode.block_table,
            block_size=cache.block_size,
            dequant_scale_query=query_scale,
            dequant_scale_key=self._one,
            dequant_scale_value=self._one,
            query_quant_mode=PER_TOKEN_HEAD,
            key_quant_mode=PER_TENSOR,
            value_quant_mode=PER_TENSOR,
            num_query_heads=heads,
            num_key_value_heads=1,
            input_layout="BSND_NBSD" if single else "TND_NTD",
            softmax_scale=scale,
        )[0]
        attended: Tensor = out.view(heads, tokens, width) * channel_scale
        return attended.transpose(0, 1)

    def gather_pa_kv_cache(self, cache: LayerCache, segment: PrefixSegment) -> tuple[Tensor, Tensor]:
        latent, k_rope = super().gather_pa_kv_cache(cache, segment)
        return (latent if cache.latent_scale is None else latent * cache.latent_scale), k_rope
