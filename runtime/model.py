"""The model, written once against the operators. Families differ in weights, constants and kind of attention.

A step can have decoding tokens and prefill chunks together. Only attention computes them separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..models.config import ModelConfig
from ..native.mapped import MappedFiles
from .attention.kind import AttentionKind
from .attention.pools import LayerCache
from .ops import AttentionWeights, Linear, MlpWeights, MoeWeights, Ops, Step
from .ranks.division import Division, add_bits


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer, either with the dense block `mlp` or with the experts `moe`."""

    input_norm: Tensor
    attention: AttentionWeights
    mlp_norm: Tensor
    mlp: MlpWeights | None
    moe: MoeWeights | None


@dataclass(frozen=True)
class ModelWeights:
    """All weights of one rank. files: mapped files behind them, if any.

    vocabulary: the division of the rows of embedding and lm_head, where ranks divide them; None where they are whole.
    """

    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Linear
    vocabulary: Division | None = None
    files: MappedFiles = field(default_factory=MappedFiles)


class Model:
    """Weights, operators, a kind of attention and the forward pass."""

    def __init__(self, config: ModelConfig, ops: Ops, weights: ModelWeights, attention: AttentionKind):
        self.config = config
        self.ops = ops
        self.weights = weights
        self.attention = attention

    @torch.inference_mode()
    def forward(self, step: Step, cache: Sequence[LayerCache]) -> Tensor:
        """Logits of the step's output rows, compute dtype `[S, vocab]`; the cache is written in place.

        Where ranks divide the vocabulary, rank 0 of their group gets all logits, and the others get none, `[0, vocab]`.

        Raises CheckpointError for a mapped file that became shorter or cannot be read any more.
        """
        files = self.weights.files
        if not files.watched:
            files.check()
        logits = self._forward(step, cache)
        files.check()
        return logits

    def _forward(self, step: Step, cache: Sequence[LayerCache]) -> Tensor:
        ops, eps = self.ops, self.config.rms_norm_eps
        residual = self._embed(step.token_ids)
        delta: Tensor | None = None
        selected: Tensor | None = None
        for layer, layer_cache in zip(self.weights.layers, cache, strict=True):
            delta, residual, selected = self.decoder_layer(layer, delta, residual, layer_cache, step, selected)
        if step.output_rows is not None:
            if step.output_rows.shape[0] == 0:
                return residual.new_empty(0, self.config.vocab_size)
            residual = residual.index_select(0, step.output_rows)
            delta = None if delta is None else delta.index_select(0, step.output_rows)
        if delta is None:
            return self._logits(ops.norms.rms_norm(residual, self.weights.norm, eps))
        return self._logits(ops.norms.add_rms_norm(delta, residual, self.weights.norm, eps)[0])

    def _embed(self, token_ids: Tensor) -> Tensor:
        vocabulary, table = self.weights.vocabulary, self.weights.embedding
        if vocabulary is None:
            return self.ops.norms.embedding(token_ids, table)
        places = token_ids - vocabulary.own.start
        foreign = (places < 0) | (places >= table.shape[0])
        rows = self.ops.norms.embedding(places.masked_fill(foreign, 0), table)
        return add_bits(rows.masked_fill(foreign.unsqueeze(1), 0), vocabulary.group)

    def _logits(self, final: Tensor) -> Tensor:
        logits, vocabulary = self.ops.products.linear(final, self.weights.lm_head), self.weights.vocabulary
        return logits if vocabulary is None else vocabulary.join_at_first(logits)

    def decoder_layer(
        self,
        layer: LayerWeights,
        delta: Tensor | None,
        residual: Tensor,
        cache: LayerCache,
        step: Step,
        selected: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run one decoder layer: (delta, residual, selected) → (delta, residual, selected).

        delta, residual: compute dtype `[T, H]`. selected: what attention hands on from layer to layer (`Attended`).

        A layer's input and output are delta + residual; the next layer's norm adds them, in one operator. An input
        delta of None is zero.
        """
        ops, attention = self.ops, self.attention
        hidden, residual = attention.norm(delta, residual, layer.input_norm, layer.attention, ops)
        attended, selected = attention.attend(hidden, layer.attention, cache, step, ops, selected)
        normed, residual = ops.norms.add_rms_norm(attended, residual, layer.mlp_norm, self.config.rms_norm_eps)
        return self._feed_forward(normed, layer), residual, selected

    def _feed_forward(self, hidden: Tensor, layer: LayerWeights) -> Tensor:
        if layer.moe is not None:
            return self.ops.routing.moe(hidden, layer.moe)
        assert layer.mlp is not None
        return self.ops.routing.mlp(hidden, layer.mlp)
