"""The model, written once against the operators. Families differ in weights, constants and kind of attention.

A step can have decoding tokens and prefill chunks together. Only attention computes them separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.config import ModelConfig
from .attention.kind import AttentionKind
from .attention.pools import LayerCache
from .model_weights import LayerWeights, ModelWeights
from .ops import Ops, Step
from .ranks.division import add_bits
from .residual import HyperStreams, Residual, SingleStream


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
        residual = self.begin(self._embed(step.token_ids))
        selected: Tensor | None = None
        for layer, layer_cache in zip(self.weights.layers, cache, strict=True):
            residual, selected = self.decoder_layer(layer, residual, layer_cache, step, selected)
        if step.output_rows is not None:
            if step.output_rows.shape[0] == 0:
                return residual.values.new_empty(0, self.config.vocab_size)
            residual = residual.at(step.output_rows)
        return self._logits(residual.final(self.weights, self.config.rms_norm_eps, self.ops))

    def begin(self, embedded: Tensor) -> Residual:
        """The residual before the first layer. embedded: rows of the embedding, compute dtype `[T, H]`."""
        return self.residual(embedded if self._streams == 1 else embedded.repeat(1, self._streams))

    def residual(self, values: Tensor) -> Residual:
        """The residual of some tokens with these `Residual.values`."""
        if self.config.hyper_connections is None:
            return SingleStream(values)
        assert self.ops.hyper is not None, "`check_backend` refuses the others"
        return HyperStreams(values.unflatten(1, (self._streams, -1)), self.ops.hyper)

    @property
    def _streams(self) -> int:
        connections = self.config.hyper_connections
        return 1 if connections is None else connections.hc_mult

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
        self, layer: LayerWeights, residual: Residual, cache: LayerCache, step: Step, selected: Tensor | None
    ) -> tuple[Residual, Tensor | None]:
        """Run one decoder layer: (residual, selected) → (residual, selected).

        selected: what attention hands on from layer to layer (`Attended`).
        """
        ops, attention = self.ops, self.attention
        hidden, residual = residual.before_attention(layer, attention, ops)
        attended, selected = attention.attend(hidden, layer.attention, cache, step, ops, selected)
        normed, residual = residual.plus(attended).before_mlp(layer, self.config.rms_norm_eps, ops)
        return residual.plus(self._feed_forward(normed, layer, step)), selected

    def _feed_forward(self, hidden: Tensor, layer: LayerWeights, step: Step) -> Tensor:
        if layer.moe is None:
            assert layer.mlp is not None
            return self.ops.routing.mlp(hidden, layer.mlp)
        if layer.moe.expert_table is not None:
            return self.ops.routing.hash_moe(hidden, step.token_ids, layer.moe)
        return self.ops.routing.moe(hidden, layer.moe)
