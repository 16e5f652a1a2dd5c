"""Attention in plain torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...attention.pools import LayerCache, StoredPool
from ..attention import LATENT, ROPE, Attention
from ..steps import Decode


class ReferenceAttention(Attention):
    """Attention on the CPU."""

    def zeros(self, pool: StoredPool, num_blocks: int, block_size: int) -> Tensor:
        shape = pool.shape(num_blocks, block_size)
        # numpy's zeros come from calloc: the pages of blocks that are never used are never touched.
        memory = np.zeros(math.prod(shape) * pool.dtype.itemsize, np.uint8)
        return torch.from_numpy(memory).view(pool.dtype).view(shape)

    def interleave_rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return _rope(x.float(), cos[:, None].float(), sin[:, None].float()).to(self.dtype)

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
        latent, rope = kv.split([gamma.shape[0], cos.shape[-1]], dim=-1)
        latent = self.norms.rms_norm(latent, gamma, eps)
        rope = _rope(rope.float(), cos.float(), sin.float()).to(self.dtype)
        cache[LATENT].write(slots, latent)
        cache[ROPE].write(slots, rope)
        return (rope, cache[LATENT].rounded(latent)) if output_kv else None

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
        query = torch.cat([q_nope, q_rope], dim=-1).float()
        key = torch.cat([k_nope, k_rope[:, None].expand(-1, k_nope.shape[1], -1)], dim=-1).float()
        outputs, lses = [], []
        for (q0, q1), (k0, k1) in zip(pairwise([0, *q_lens]), pairwise([0, *kv_lens]), strict=True):
            past = (k1 - k0) - (q1 - q0) if causal else None
            out, lse = self._attention(query[q0:q1], key[k0:k1], value[k0:k1].float(), scale, past)
            outputs.append(out.to(self.dtype))
            lses.append(lse)
        return torch.cat(outputs), torch.cat(lses)

    def fused_infer_attention_paged(
        self, q_latent: Tensor, q_rope: Tensor, cache: LayerCache, decode: Decode, scale: float
    ) -> Tensor:
        channel_scale = cache[LATENT].scale
        content = q_latent.float() if channel_scale is None else self._in_codes(q_latent, channel_scale)
        query = torch.cat([content, q_rope.float()], dim=-1)
        outputs = []
        for (q0, q1), length, blocks in zip(
            pairwise([0, *decode.q_lens]), decode.kv_lens, decode.block_table, strict=True
        ):
            used = blocks[: -(-length // cache.block_size)]
            latent = cache[LATENT].read(used, length).float()
            key = torch.cat([latent, cache[ROPE].read(used, length).float()], dim=-1)
            out, _ = self._attention(query[q0:q1], key[:, None], latent[:, None], scale, length - (q1 - q0))
            outputs.append((out if channel_scale is None else out * channel_scale).to(self.dtype))
        return torch.cat(outputs)

    def _in_codes(self, q_latent: Tensor, scale: Tensor) -> Tensor:
        """Scale queries `[T, N, L]` for int8 keys and round them to int8 per token and head: float32 values."""
        rows = self.norms.dynamic_quant(q_latent.flatten(0, 1), scale)
        return (rows.codes.float() * rows.scale[:, None]).view(q_latent.shape)

    def _attention(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, past: int | None
    ) -> tuple[Tensor, Tensor]:
        """Attend in float32: query `[Q, N, A]` → (output `[Q, N, V]`, log-sum-exp `[Q, N, 1]`).

        key: `[S, N or 1, A]`. value: `[S, N or 1, V]`.
        past: query i sees keys up to past + i; None: all keys.
        """
        scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * scale  # [N, Q, S]
        if past is not None:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(past + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        blind = lse.isneginf()  # rows that see no key
        probabilities = (scores - lse.masked_fill(blind, 0.0)).exp()
        return (probabilities @ value.transpose(0, 1)).transpose(0, 1), lse.transpose(0, 1)

    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        weights = torch.stack(list(lses)).softmax(dim=0)  # [parts, T, N, 1]
        return (weights * torch.stack(list(outputs)).float()).sum(0).to(self.dtype)


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even, odd], dim=-1) * cos + torch.cat([-odd, even], dim=-1) * sin
