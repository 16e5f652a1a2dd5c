"""The model, written once against the operators: DeepSeek-V2, V3 and Kimi-K2 differ in their weights and constants.

Decoding tokens attend in absorbed form on the latent cache; prefill chunks attend over decompressed keys and values,
and a chunk that continues a sequence merges in attention over what is cached. Both kinds share every other operator,
so that a step can carry decodes beside a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..native.mapped import MappedFiles
from .ops import Activation, LayerCache, Linear, Mla, MlpWeights, MoeWeights, Ops, Prefill, Step


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer. `mlp` is the dense block, or the shared experts beside `moe` (None where there are none)."""

    input_norm: Tensor
    attention: Mla
    mlp_norm: Tensor
    mlp: MlpWeights | None
    moe: MoeWeights | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights, and the `files` that they are mapped from, if they are."""

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear
    files: MappedFiles = field(default_factory=MappedFiles)


class Model:
    """Weights, operators and the forward pass."""

    def __init__(self, config: ModelConfig, ops: Ops, weights: ModelWeights, softmax_scale: float):
        self.config = config
        self.ops = ops
        self.weights = weights
        self.softmax_scale = softmax_scale

    @torch.inference_mode()
    def forward(self, step: Step, cache: Sequence[LayerCache]) -> Tensor:
        """Logits of the step's output rows, compute dtype `[S, vocab]`; the cache is written in place.

        Raises CheckpointError when a file of the weights became shorter, or cannot be read any more.
        """
        files = self.weights.files
        if not files.watched:
            files.check()
        logits = self._forward(step, cache)
        files.check()
        return logits

    def _forward(self, step: Step, cache: Sequence[LayerCache]) -> Tensor:
        ops, eps = self.ops, self.config.rms_norm_eps
        residual = ops.embedding(step.token_ids, self.weights.embedding)
        delta: Tensor | None = None
        for layer, layer_cache in zip(self.weights.layers, cache, strict=True):
            delta, residual = self.decoder_layer(layer, delta, residual, layer_cache, step)
        if step.output_rows is not None:
            if step.output_rows.shape[0] == 0:
                return residual.new_empty(0, self.config.vocab_size)
            residual = residual[step.output_rows]
            delta = None if delta is None else delta[step.output_rows]
        if delta is None:
            return ops.linear(ops.rms_norm(residual, self.weights.norm, eps), self.weights.lm_head)
        final, _ = ops.add_rms_norm(delta, residual, self.weights.norm, eps)
        return ops.linear(final, self.weights.lm_head)

    def decoder_layer(
        self, layer: LayerWeights, delta: Tensor | None, residual: Tensor, cache: LayerCache, step: Step
    ) -> tuple[Tensor, Tensor]:
        """One layer of the forward pass: (delta, residual), compute dtype `[T, H]` each, whose sum is its output.

        The sum of those that come in is its input; delta is None where the residual alone is. The next layer's norm
        adds them, in one operator.
        """
        ops, eps = self.ops, self.config.rms_norm_eps
        hidden, residual = ops.attention_norm(delta, residual, layer.input_norm, eps, layer.attention)
        attended = self._attention(hidden, layer.attention, cache, step)
        normed, residual = ops.add_rms_norm(attended, residual, layer.mlp_norm, eps)
        return self._feed_forward(normed, layer), residual

    def _feed_forward(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        if layer.moe is not None:
            return self.ops.moe(hidden, layer.moe, layer.mlp)
        assert layer.mlp is not None
        return self.ops.mlp(hidden, layer.mlp)

    def _attention(self, hidden: Activation, mla: Mla, cache: LayerCache, step: Step) -> Tensor:
        ops = self.ops
        if step.prefill is None:
            return ops.mla_decode(hidden, mla, cache, step, self.softmax_scale)

        q_nope, q_rope, kv = ops.mla_project(hidden, mla)
        written = ops.mla_write_cache(kv, mla, cache, step, output_kv=True)
        assert written is not None
        k_rope, latent = written  # [T, D], [T, L]
        q_rope = ops.interleave_rope(q_rope, step.cos, step.sin)
        first = step.num_decode_tokens
        attended = self._prefill(
            q_nope[first:], q_rope[first:], latent[first:], k_rope[first:], mla, cache, step.prefill
        )
        if first:
            decoded = self._decode(ops.mla_absorb(q_nope[:first], mla), q_rope[:first], mla, cache, step)
            attended = torch.cat([decoded, attended])
        return ops.mla_output(attended, mla)

    def _decode(self, q_latent: Tensor, q_rope: Tensor, mla: Mla, cache: LayerCache, step: Step) -> Tensor:
        assert step.decode is not None
        attended = self.ops.fused_infer_attention_paged(q_latent, q_rope, cache, step.decode, self.softmax_scale)
        return self.ops.mla_bring_out(attended, mla)  # [T, N, v]

    def _prefill(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        mla: Mla,
        cache: LayerCache,
        prefill: Prefill,
    ) -> Tensor:
        ops, scale = self.ops, self.softmax_scale
        k_nope, value = ops.mla_decompress(latent, mla)
        attended, lse = ops.fused_infer_attention(
            q_nope, q_rope, k_nope, k_rope, value, prefill.q_lens, prefill.q_lens, scale, causal=True
        )
        for prefix in prefill.prefixes:
            rows = slice(*prefix.rows)
            queries = prefix.rows[1] - prefix.rows[0]
            outputs, lses = [attended[rows]], [lse[rows]]
            for segment in prefix.segments:
                cached_latent, cached_rope = ops.gather_pa_kv_cache(cache, segment)
                k_nope, value = ops.mla_decompress(cached_latent, mla)
                out, out_lse = ops.fused_infer_attention(
                    q_nope[rows],
                    q_rope[rows],
                    k_nope,
                    cached_rope,
                    value,
                    (queries,),
                    (segment.length,),
                    scale,
                    causal=False,
                )
                outputs.append(out)
                lses.append(out_lse)
            attended[rows] = ops.attention_update(outputs, lses)
        return attended
