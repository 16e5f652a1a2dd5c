"""Multi-head latent attention in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ...attention.pools import LayerCache
from ..handles import Keys, Queries
from ..latent_attention import LATENT, ROPE, LatentAttention
from ..steps import Decode, Lengths, Positions


class ReferenceLatentAttention(LatentAttention):
    """Attention on the CPU."""

    def kv_rmsnorm_rope_cache(
        self, kv: Tensor, gamma: Tensor, eps: float, positions: Positions, cache: LayerCache, output_kv: bool
    ) -> tuple[Tensor, Tensor] | None:
        latent, rope = kv.split([gamma.shape[0], positions.cos.shape[-1]], dim=-1)
        latent = self.norms.rms_norm(latent, gamma, eps)
        rope = self.rotary.interleave_rope(rope[:, None], positions.cos, positions.sin)[:, 0]
        cache[LATENT].write(positions.slots, latent)
        cache[ROPE].write(positions.slots, rope)
        return (rope, cache[LATENT].rounded(latent)) if output_kv else None

    def fused_infer_attention(
        self, queries: Queries, keys: Keys, lengths: Lengths, scale: float
    ) -> tuple[Tensor, Tensor]:
        query = torch.cat(queries, dim=-1).float()
        key = torch.cat([keys.nope, keys.rope[:, None].expand(-1, keys.nope.shape[1], -1)], dim=-1).float()
        ends = pairwise([0, *lengths.q_lens]), pairwise([0, *lengths.kv_lens])
        outputs, lses = [], []
        for (q0, q1), (k0, k1) in zip(*ends, strict=True):
            past = (k1 - k0) - (q1 - q0) if lengths.causal else None
            out, lse = self._attention(query[q0:q1], key[k0:k1], keys.value[k0:k1].float(), scale, past)
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
        if query.shape[1] == 1:
            # Torch multiplies one matrix by another routine than several, with other last bits.
            out, lse = self._attention(query.expand(-1, 2, -1), key, value, scale, past)
            return out[:, :1], lse[:, :1]
        scores = query.transpose(0, 1) @ key.permute(1, 2, 0) * scale  # [N, Q, S]
        if past is not None:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(past + 1)
            scores = scores.masked_fill(hidden, float("-inf"))
        lse = scores.logsumexp(-1, keepdim=True)
        blind = lse.isneginf()  # rows that see no key
        probabilities = (scores - lse.masked_fill(blind, 0.0)).exp()
        return (probabilities @ value.transpose(0, 1)).transpose(0, 1), lse.transpose(0, 1)

    def attention_update(self, outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
        largest = torch.stack(list(lses)).amax(0)  # [T, N, 1]
        weights = [(lse - largest).exp() for lse in lses]
        # One after the other: the last bits of torch's softmax and sum depend on the number of heads.
        merged = sum(weight * out.float() for weight, out in zip(weights, outputs, strict=True))
        return torch.div(merged, sum(weights)).to(self.dtype)
