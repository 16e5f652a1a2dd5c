"""The int8 latent cache on torch_npu: written in plain steps, read by attention in full int8.

`npu_fused_infer_attention_score_v2` takes int8 queries, keys and values, one scale a tensor for keys and for values,
and rope in bfloat16. So keys and values get the scale 1, the channels' scales multiply the queries before the operator,
and its result after it. No operator writes an int8 latent with a scale a channel beside a bfloat16 rope:
`npu_kv_rmsnorm_rope_cache` quantizes both pools or none, and `npu_mla_prolog_v3` serves decode steps only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.pools import LayerCache
from ..latent_attention import LATENT, ROPE
from ..norms import Norms
from ..rotary import Rotary
from ..steps import Decode, Positions
from .device import NO_MASK, RIGHT_DOWN_CAUSAL, Npu

PER_TOKEN_HEAD, PER_TENSOR = 3, 0  # quant modes of queries, and of keys and values
# A query of zeros has the scale 0, and its rope part is divided by the scale.
_LEAST_SCALE = 1e-30


class Int8Cache:
    """Writing of, and attention over, caches with an int8 latent."""

    def __init__(self, npu: Npu, norms: Norms, rotary: Rotary, causal_mask: Tensor):
        self.npu, self.norms, self.rotary = npu, norms, rotary
        self._causal_mask = causal_mask
        self._one = torch.ones(1, dtype=torch.float32, device=npu.device)

    def write(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Write tokens: see `LatentAttention.kv_rmsnorm_rope_cache`."""
        scale = cache[LATENT].scale
        assert scale is not None
        latent, k_rope = kv.split([gamma.shape[0], positions.cos.shape[-1]], dim=-1)
        latent = self.norms.rms_norm(latent, gamma, eps)
        k_rope = self.rotary.interleave_rope(k_rope.unsqueeze(1), positions.cos, positions.sin).squeeze(1)
        codes = self.npu.operators.npu_quantize(latent, scale, None, torch.qint8, -1)
        block, offset = positions.slots // cache.block_size, positions.slots % cache.block_size
        for name, rows in ((LATENT, codes), (ROPE, k_rope)):
            tensor = cache[name].tensor
            tensor[block, :, offset] = rows.unflatten(-1, (-1, tensor.shape[-1]))
        return (k_rope, codes * scale) if output_kv else None

    def attend(self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float) -> Tensor:
        """Attend: see `LatentAttention.fused_infer_attention_paged`."""
        channel_scale = cache[LATENT].scale
        assert channel_scale is not None
        tokens, heads, width = q_latent.shape
        query = self.norms.dynamic_quant(q_latent.flatten(0, 1), channel_scale)
        query_scale = query.scale.clamp_min(_LEAST_SCALE).view(tokens, heads)
        # The operator multiplies both parts of a score by the query's scale.
        rope = (q_rope / query_scale.unsqueeze(-1)).to(self.npu.dtype)
        codes = query.codes.view(tokens, heads, width)
        single = tokens == len(decode.q_lens)
        if single:  # a batch of one query each: nothing to mask
            codes, rope, query_scale = (each.unsqueeze(1) for each in (codes, rope, query_scale))
        latent = cache[LATENT].tensor.unsqueeze(1)
        out = self.npu.operators.npu_fused_infer_attention_score_v2(
            codes,
            latent,
            latent,
            query_rope=rope,
            key_rope=cache[ROPE].tensor.unsqueeze(1),
            atten_mask=None if single else self._causal_mask,
            sparse_mode=NO_MASK if single else RIGHT_DOWN_CAUSAL,
            actual_seq_qlen=None if single else decode.q_lens,
            actual_seq_kvlen=decode.kv_lens,
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
