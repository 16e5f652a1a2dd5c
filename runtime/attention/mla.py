"""Multi-head latent attention. Its cache holds a latent and a rotated key of every token, shared by all heads.

Decoding tokens attend in absorbed form, to the cached latents themselves. Prefill chunks attend to decompressed keys
and values. A chunk that continues a sequence also attends to its cached tokens, and merges the two results.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Activation, AttentionWeights, Mla, MlaConfig, MlaParts, Ops, Prefill, Step
from ..ops.attention import LATENT, ROPE
from ..ops.handles import own
from .kind import Parts
from .pools import LayerCache, Pool


@dataclass(frozen=True)
class MlaAttention:
    """Multi-head latent attention of one model. See `AttentionKind`."""

    config: MlaConfig

    def pools(self, layer: int) -> tuple[Pool, ...]:
        return Pool(LATENT, self.config.kv_lora_rank, int8=True), Pool(ROPE, self.config.qk_rope_head_dim)

    def load(self, parts: Parts, ops: Ops) -> Mla:
        latent_queries = self.config.q_lora_rank is not None
        return ops.attention.mla(
            MlaParts(
                q=None if latent_queries else parts.linear("q"),
                q_a=parts.linear("q_a") if latent_queries else None,
                q_a_norm=parts.tensor("q_a_norm") if latent_queries else None,
                q_b=parts.linear("q_b") if latent_queries else None,
                kv_a=parts.linear("kv_a"),
                kv_a_norm=parts.tensor("kv_a_norm"),
                kv_b=parts.tensor("kv_b"),
                o=parts.linear("o"),
            ),
            self.config,
        )

    def norm(
        self, x: Tensor | None, residual: Tensor, gain: Tensor, weights: AttentionWeights, ops: Ops
    ) -> tuple[Activation, Tensor]:
        return ops.attention.attention_norm(x, residual, gain, self.config.rms_norm_eps, own(weights, Mla))

    def write(
        self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops
    ) -> dict[str, Tensor]:
        mla = own(weights, Mla)
        k_rope, latent = _written(ops.attention.mla_kv(hidden, mla), mla, cache, step, ops)
        return {LATENT: latent, ROPE: k_rope}

    def attend(self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops) -> Tensor:
        attention, mla = ops.attention, own(weights, Mla)
        if step.prefill is None:
            return attention.mla_decode(hidden, mla, cache, step)

        q_nope, q_rope, kv = attention.mla_project(hidden, mla)
        k_rope, latent = _written(kv, mla, cache, step, ops)  # [T, D], [T, L]
        q_rope = attention.interleave_rope(q_rope, step.cos, step.sin)
        first = step.num_decode_tokens
        attended = self._prefill(
            q_nope[first:], q_rope[first:], latent[first:], k_rope[first:], mla, cache, step.prefill, ops
        )
        if first:
            q_latent = attention.mla_absorb(q_nope[:first], mla)
            attended = torch.cat([self._decode(q_latent, q_rope[:first], mla, cache, step, ops), attended])
        return attention.mla_output(attended, mla)

    def _decode(self, q_latent: Tensor, q_rope: Tensor, mla: Mla, cache: LayerCache, step: Step, ops: Ops) -> Tensor:
        assert step.decode is not None
        scale = self.config.softmax_scale
        attended = ops.attention.fused_infer_attention_paged(q_latent, q_rope, cache, step.decode, scale)
        return ops.attention.mla_bring_out(attended, mla)  # [T, N, v]

    def _prefill(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        mla: Mla,
        cache: LayerCache,
        prefill: Prefill,
        ops: Ops,
    ) -> Tensor:
        attention, scale = ops.attention, self.config.softmax_scale
        k_nope, value = attention.mla_decompress(latent, mla)
        attended, lse = attention.fused_infer_attention(
            q_nope, q_rope, k_nope, k_rope, value, prefill.q_lens, prefill.q_lens, scale, causal=True
        )
        for prefix in prefill.prefixes:
            rows = slice(*prefix.rows)
            queries = prefix.rows[1] - prefix.rows[0]
            outputs, lses = [attended[rows]], [lse[rows]]
            for segment in prefix.segments:
                cached = attention.gather_pa_kv_cache(cache, segment)
                k_nope, value = attention.mla_decompress(cached[LATENT], mla)
                out, out_lse = attention.fused_infer_attention(
                    q_nope[rows],
                    q_rope[rows],
                    k_nope,
                    cached[ROPE],
                    value,
                    (queries,),
                    (segment.length,),
                    scale,
                    causal=False,
                )
                outputs.append(out)
                lses.append(out_lse)
            attended[rows] = attention.attention_update(outputs, lses)
        return attended


def _written(kv: Tensor, mla: Mla, cache: LayerCache, step: Step, ops: Ops) -> tuple[Tensor, Tensor]:
    written = ops.attention.mla_write_cache(kv, mla, cache, step, output_kv=True)
    assert written is not None
    return written
