"""Grouped-query attention (Qwen3-MoE, GLM-4.5). Its cache holds the keys, normed and rotated, and the values.

A sequence's first chunk attends to its own keys and values. Later chunks and decoding tokens attend to the pages, into
which their own keys and values are written before.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import BackendError
from ..ops import Activation, AttentionWeights, Gqa, GqaConfig, GqaParts, Ops, Step
from ..ops.grouped_attention import KEY, VALUE
from ..ops.handles import own
from .kind import Attended, Parts
from .pools import LayerCache, Pool


@dataclass(frozen=True)
class GqaAttention:
    """Grouped-query attention of one model. See `AttentionKind`. bias: q, k and v have biases; qk_norm: norms."""

    config: GqaConfig
    bias: bool
    qk_norm: bool

    @property
    def dense_tokens(self) -> int | None:
        return None

    @property
    def absorbed_tokens(self) -> int:
        return sys.maxsize

    @property
    def continues_on_pages(self) -> bool:
        return True

    def pools(self, layer: int) -> tuple[Pool, ...]:
        # The NPU's attention reads 16-bit keys and values of several heads in ND pages alone.
        channels = self.config.kv_heads * self.config.head_dim
        return Pool(KEY, channels, layout="nd"), Pool(VALUE, channels, layout="nd")

    def load(self, layer: int, parts: Parts, ops: Ops) -> Gqa:
        stored = GqaParts(
            q=parts.linear("q"),
            k=parts.linear("k"),
            v=parts.linear("v"),
            o=parts.linear("o"),
            biases=(parts.tensor("q_bias"), parts.tensor("k_bias"), parts.tensor("v_bias")) if self.bias else None,
            q_norm=parts.tensor("q_norm") if self.qk_norm else None,
            k_norm=parts.tensor("k_norm") if self.qk_norm else None,
        )
        return ops.gqa.load(stored, self.config)

    def with_cache_scales(self, weights: AttentionWeights, scales: Mapping[str, Tensor], ops: Ops) -> Gqa:
        raise BackendError(f"no int8 codes can stand in pools {sorted(scales)} of this model's KV cache")

    def norm(
        self, x: Tensor | None, residual: Tensor, gain: Tensor, weights: AttentionWeights, ops: Ops
    ) -> tuple[Activation, Tensor]:
        return ops.gqa.norm(x, residual, gain, self.config.rms_norm_eps, own(weights, Gqa))

    def write(
        self, hidden: Activation, weights: AttentionWeights, cache: LayerCache, step: Step, ops: Ops
    ) -> dict[str, Tensor]:
        _, key, value = ops.gqa.write(hidden, own(weights, Gqa), cache, step.positions)
        return {KEY: key.flatten(1), VALUE: value.flatten(1)}

    def attend(
        self,
        hidden: Activation,
        weights: AttentionWeights,
        cache: LayerCache,
        step: Step,
        ops: Ops,
        selected: Tensor | None = None,
    ) -> Attended:
        gqa = own(weights, Gqa)
        if step.prefill is None:
            return Attended(ops.gqa.decode(hidden, gqa, cache, step))
        query, key, value = ops.gqa.write(hidden, gqa, cache, step.positions)
        first, scale = step.num_decode_tokens, self.config.softmax_scale
        attended = ops.gqa.fused_infer_attention(query[first:], key[first:], value[first:], step.prefill.lengths, scale)
        if step.decode is not None:
            continued = ops.gqa.fused_infer_attention_paged(query[:first], cache, step.decode, scale)
            attended = torch.cat([continued, attended])
        return Attended(ops.gqa.output(attended, gqa))
