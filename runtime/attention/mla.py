"""Multi-head latent attention. Its cache holds a latent and a rotated key of every token, shared by all heads.

Decoding tokens attend in absorbed form, to the cached latents themselves. Prefill chunks attend to decompressed keys
and values. A chunk that continues a sequence also attends to its cached tokens, and merges the two results.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import Activation, AttentionWeights, Mla, MlaConfig, MlaParts, Ops, Prefill, PrefixSegment, Queries, Step
from ..ops.handles import own
from ..ops.latent_attention import LATENT, ROPE
from .kind import Attended, Parts
from .pools import LayerCache, Pool


@dataclass(frozen=True)
class MlaAttention:
    """Multi-head latent attention of one model. See `AttentionKind`."""

    config: MlaConfig

    @property
    def dense_tokens(self) -> int | None:
        return None

    @property
    def absorbed_tokens(self) -> int:
        # For a head and a cached token: decompression takes L · (n + v) products, and then a query n + r + v; in
        # absorbed form a query takes 2 L + r.
        sizes = self.config
        decompressed = sizes.qk_nope_head_dim + sizes.v_head_dim
        saved = 2 * sizes.kv_lora_rank - decompressed
        return sizes.kv_lora_rank * decompressed // saved if saved > 0 else sys.maxsize

    @property
    def continues_on_pages(self) -> bool:
        return False

    def pools(self, layer: int) -> tuple[Pool, ...]:
        return Pool(LATENT, self.config.kv_lora_rank, int8=True), Pool(ROPE, self.config.qk_rope_head_dim)

    def load(self, layer: int, parts: Parts, ops: Ops) -> Mla:
        latent_queries = self.config.q_lora_rank is not None
        return ops.mla.load(
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

    def with_cache_scales(self, weights: AttentionWeights, scales: Mapping[str, Tensor], ops: Ops) -> Mla:
        return ops.mla.with_cache_scale(own(weights, Mla), scales[LATENT])

    def norm(
        self, x: Tensor | None, residual: Tensor, gain: Tensor, weights: AttentionWeights, ops: Ops
    ) -> tuple[Activation, Tensor]:
        return ops.mla.norm(x, residual, gain, self.config.rms_norm_eps, own(weights, Mla))

    def write(
        self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops
    ) -> dict[str, Tensor]:
        mla = own(weights, Mla)
        k_rope, latent = _written(ops.mla.project_kv(hidden, mla), mla, cache, step, ops)
        return {LATENT: latent, ROPE: k_rope}

    def attend(
        self,
        hidden: Activation,
        weights: AttentionWeights,
        cache: LayerCache,
        step: Step,
        ops: Ops,
        selected: Tensor | None = None,
    ) -> Attended:
        mla = own(weights, Mla)
        if step.prefill is None:
            return Attended(ops.mla.decode(hidden, mla, cache, step))

        q_nope, q_rope, kv, _ = ops.mla.project(hidden, mla)
        k_rope, latent = _written(kv, mla, cache, step, ops)  # [T, D], [T, L]
        q_rope = ops.rotary.interleave_rope(q_rope, step.positions.cos, step.positions.sin)
        first = step.num_decode_tokens
        queries = Queries(q_nope[first:], q_rope[first:])
        attended = self._prefill(queries, latent[first:], k_rope[first:], mla, cache, step.prefill, ops)
        if first:
            q_latent = ops.mla.absorb(q_nope[:first], mla)
            attended = torch.cat([self._decode(q_latent, q_rope[:first], mla, cache, step, ops), attended])
        return Attended(ops.mla.output(attended, mla))

    def _decode(self, q_latent: Tensor, q_rope: Tensor, mla: Mla, cache: LayerCache, step: Step, ops: Ops) -> Tensor:
        assert step.decode is not None
        scale = self.config.softmax_scale
        attended = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, step.decode, scale)
        return ops.mla.bring_out(attended, mla)  # [T, N, v]

    def _prefill(
        self,
        queries: Queries,
        latent: Tensor,
        k_rope: Tensor,
        mla: Mla,
        cache: LayerCache,
        prefill: Prefill,
        ops: Ops,
    ) -> Tensor:
        scale = self.config.softmax_scale
        keys = ops.mla.decompress(latent, k_rope, mla)
        attended, lse = ops.mla.fused_infer_attention(queries, keys, prefill.lengths, scale)
        parts = [self._attend_to(segment, queries, mla, cache, ops) for segment in prefill.segments]
        for merge in prefill.merges:
            rows = slice(*merge.rows)
            outputs, lses = [attended[rows]], [lse[rows]]
            for index in merge.segments:
                first = prefill.segments[index].rows[0]
                part_rows = slice(rows.start - first, rows.stop - first)
                outputs.append(parts[index][0][part_rows])
                lses.append(parts[index][1][part_rows])
            attended[rows] = ops.mla.attention_update(outputs, lses)
        return attended

    def _attend_to(
        self, segment: PrefixSegment, queries: Queries, mla: Mla, cache: LayerCache, ops: Ops
    ) -> tuple[Tensor, Tensor]:
        """Attention of the segment's rows to its cached tokens: output and log-sum-exp."""
        rows = slice(*segment.rows)
        cached = ops.caches.gather(cache, segment.blocks, segment.num_tokens, segment.kept)
        keys = ops.mla.decompress(cached[LATENT], cached[ROPE], mla)
        some = Queries(queries.nope[rows], queries.rope[rows])
        return ops.mla.fused_infer_attention(some, keys, segment.lengths, self.config.softmax_scale)


def _written(kv: Tensor, mla: Mla, cache: LayerCache, step: Step, ops: Ops) -> tuple[Tensor, Tensor]:
    written = ops.mla.write_cache(kv, mla, cache, step.positions, output_kv=True)
    assert written is not None
    return written
