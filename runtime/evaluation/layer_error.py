"""Error of each decoder layer's output. One layer of either model is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import GenerationError
from ...formats.artifact import converted_as, is_rotated
from ...formats.checkpoint import Checkpoint
from ...formats.sources.model_config import read_model_config
from ...progress import Progress, Silent, Task
from ...quant.rotation import rotation
from ..attention.kinds import attention_of
from ..attention.pools import LayerCache
from ..backend import make_ops
from ..engine import check_token_ids
from ..model import Model
from ..model_weights import LayerWeights
from ..ops import Ops, Step
from ..step import Chunk, RopeRows, StepBuilder
from ..store import open_store
from ..text.tokenizer import Tokenizer
from ..weights import load_layer, load_rope_tables, load_weights
from .perplexity import DEFAULT_CONTEXT, Context, cut_contexts

_STEP_TOKENS = 1024
_BLOCK_SIZE = 128


@dataclass(frozen=True)
class LayerError:
    """Error of a decoder layer's output, the hidden states `[tokens, hidden_size]`, against the source's.

    Of a model with several residual streams, the output is all of them.

    relative_error: ‖quantized − float‖ / ‖float‖ over all tokens. cosine: of the two outputs of a token, mean over
    tokens. In both, each model ran its own layers before this one: errors of all layers so far accumulate. `own_…`: the
    same with the float model's hidden states as input of both: the error of this layer alone.
    own_selection_agreement: of the tokens that the float model's indexer selects, the share that the quantized one
    selects too, over queries that see more than they select; None without such queries, and without an indexer.
    """

    layer: int
    relative_error: float
    cosine: float
    own_relative_error: float
    own_cosine: float
    own_selection_agreement: float | None = None


def layer_errors(
    model: str | Path,
    text: str,
    source: str | Path,
    context: int = DEFAULT_CONTEXT,
    backend: str = "auto",
    progress: Progress | None = None,
    family: str | None = None,
) -> list[LayerError]:
    """Errors of an artifact's decoder layers (without MTP layers) on a text, cut into contexts as by `evaluate`.

    Memory holds one layer of each model, and the hidden states of all tokens twice, in the compute dtype.
    `progress` counts layers. `family`: as of `load`, for both. Raises GenerationError for a text that is too short, for
    directories of different models, and for a layer with an output that is not finite, which it names.
    """
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(Checkpoint.open(directory)) for directory in (model, source))
        ours.read_as(family)
        theirs.read_as(family or converted_as(ours.directory, theirs.config))
        quantized, original = (_Side(checkpoint, make_ops(backend)) for checkpoint in (ours, theirs))
        quantized.refuse_unlike(original)
        contexts = cut_contexts(text, Tokenizer(quantized.directory), context)
        turn = _turn(quantized, original)
        return _walk(quantized, original, _batches(contexts), turn, progress or Silent())


def _turn(quantized: _Side, original: _Side) -> Callable[[Tensor], Tensor]:
    """Map from the source's hidden states to the model's: the rotation of its residual stream, or the identity."""
    if is_rotated(quantized.directory) == is_rotated(original.directory):
        return lambda stream: stream
    if is_rotated(original.directory):
        raise GenerationError(f"{original.directory}: is rotated; give the float checkpoint as --source")
    turned = rotation(quantized.config.hidden_size)
    return lambda stream: turned.rows(stream.to("cpu")).to(stream.device, stream.dtype)


@torch.inference_mode()
def _walk(
    quantized: _Side,
    original: _Side,
    batches: Sequence[Sequence[Context]],
    turn: Callable[[Tensor], Tensor],
    progress: Progress,
) -> list[LayerError]:
    steps = [(quantized.step(batch), original.step(batch)) for batch in batches]
    streams = [(_Stream(quantized.embed(ours)), _Stream(original.embed(theirs))) for ours, theirs in steps]
    layers = original.config.num_hidden_layers
    errors = []
    progress.start(Task("evaluate", layers, "layers", layers=layers))
    for number in range(layers):
        ours, theirs = quantized.load(number), original.load(number)
        accumulated, own, selections = _Comparison(), _Comparison(), _Agreement()
        for index, (our_step, their_step) in enumerate(steps):
            our_stream, their_stream = streams[index]
            output = original.run(theirs, their_stream, their_step)
            moved = quantized.run(ours, our_stream, our_step)
            alone = quantized.run(ours, _Stream(turn(their_stream.hidden), their_stream.selected), our_step)
            accumulated.add(moved.hidden, turn(output.hidden))
            own.add(alone.hidden, turn(output.hidden))
            if output.selected is not None and output.selected is not their_stream.selected:
                selections.add(alone.selected, output.selected, their_step)
            streams[index] = moved, output
        errors.append(LayerError(number, *accumulated.result(number), *own.result(number), selections.result()))
        progress.advance(1, layer=number, layer_done=True)
    return errors


class _Layer(NamedTuple):
    weights: LayerWeights
    cache: LayerCache


class _Stream(NamedTuple):
    """Hidden states between two layers, and what attention hands on."""

    hidden: Tensor
    selected: Tensor | None = None


class _Side:
    """One of the two models, its decoder layers left on the disk."""

    def __init__(self, checkpoint: Checkpoint, ops: Ops):
        self.directory = checkpoint.directory
        self.config = read_model_config(checkpoint)
        tables = load_rope_tables(checkpoint, self.config)
        self._store = open_store(checkpoint, ops.dtype)
        attention = attention_of(self.config, tables.softmax_scale)
        weights = load_weights(self._store, self.config, ops, attention, layers=())
        self._model = Model(self.config, ops, weights, attention)
        self._rope = RopeRows.of(tables, ops)
        self._blocks = 1  # of the longest step

    def refuse_unlike(self, other: _Side) -> None:
        for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
            ours, theirs = getattr(self.config, name), getattr(other.config, name)
            if ours != theirs:
                raise GenerationError(
                    f"{self.directory} has {name} {ours} and {other.directory} has {theirs}: not the same model"
                )
        ours, theirs = self._model.attention, other._model.attention
        layers = range(self.config.num_hidden_layers)
        if ours.dense_tokens != theirs.dense_tokens or any(ours.pools(i) != theirs.pools(i) for i in layers):
            raise GenerationError(f"{self.directory} and {other.directory} differ in attention: not the same model")

    def step(self, batch: Sequence[Context]) -> Step:
        longest = max(len(each.inputs) for each in batch)
        if longest > self._rope.max_position:
            raise GenerationError(
                f"a context of {longest} tokens exceeds the {self._rope.max_position} of {self.directory}; "
                "lower --context"
            )
        for each in batch:
            check_token_ids(each.inputs, self.config.vocab_size)
        attention = self._model.attention
        builder = StepBuilder(self._model.ops, self._rope, _BLOCK_SIZE, _STEP_TOKENS, attention.dense_tokens)
        # Whole sequences in one step read no cache, unless attention selects tokens in it.
        cached = attention.dense_tokens is not None and longest > attention.dense_tokens
        counts = [-(-len(each.inputs) // _BLOCK_SIZE) if cached else 0 for each in batch]
        self._blocks = max(self._blocks, sum(counts))
        firsts = [0, *accumulate(counts)]
        chunks = [
            Chunk(each.inputs, 0, range(first, first + count), all_rows=True)
            for each, first, count in zip(batch, firsts, counts, strict=False)
        ]
        return builder.build(chunks)[0]

    def embed(self, step: Step) -> Tensor:
        model = self._model
        return model.begin(model.ops.norms.embedding(step.token_ids, model.weights.embedding)).values

    def load(self, layer: int) -> _Layer:
        ops, attention = self._model.ops, self._model.attention
        # The writing operators take a cache also where nothing is cached.
        cache = ops.caches.new(attention.pools(layer), self._blocks, _BLOCK_SIZE)
        return _Layer(load_layer(self._store, self.config, ops, attention, layer), cache)

    def run(self, layer: _Layer, stream: _Stream, step: Step) -> _Stream:
        """Run a layer: its output for its input."""
        model = self._model
        given = model.residual(stream.hidden.clone())
        residual, selected = model.decoder_layer(layer.weights, given, layer.cache, step, stream.selected)
        model.weights.files.check()
        return _Stream(residual.values, selected)


class _Comparison:
    """Sums of squared errors, squared norms and cosines over tokens, in float64."""

    def __init__(self) -> None:
        self._error = self._norm = self._cosine = 0.0
        self._tokens = 0

    def add(self, output: Tensor, reference: Tensor) -> None:
        ours, theirs = output.to("cpu", torch.float64), reference.to("cpu", torch.float64)
        self._error += float((ours - theirs).square().sum())
        self._norm += float(theirs.square().sum())
        self._cosine += float(torch.cosine_similarity(ours, theirs, dim=-1).sum())
        self._tokens += ours.shape[0]

    def result(self, layer: int) -> tuple[float, float]:
        if not (math.isfinite(self._error) and math.isfinite(self._norm)):
            raise GenerationError(
                f"layer {layer}: its output is not finite: weights or scales are damaged; run npuq verify"
            )
        relative = math.sqrt(self._error / self._norm) if self._norm else float(self._error > 0)
        return relative, self._cosine / self._tokens


class _Agreement:
    """Tokens that both models select, of those that one does."""

    def __init__(self) -> None:
        self._both = self._all = 0

    def add(self, selected: Tensor | None, reference: Tensor, step: Step) -> None:
        """Add the selections of a step, int32 `[T, 1, k]` each, of whole sequences."""
        assert selected is not None and step.decode is not None
        count = reference.shape[-1]
        choosing = torch.cat([torch.arange(length) >= count for length in step.decode.kv_lens])
        pairs = torch.cat([selected, reference], dim=-1)[:, 0].to("cpu")[choosing].sort(dim=-1).values
        self._both += int((pairs[:, 1:] == pairs[:, :-1]).sum())  # a selection has no token twice
        self._all += count * int(choosing.sum())

    def result(self) -> float | None:
        return self._both / self._all if self._all else None


def _batches(contexts: Sequence[Context]) -> list[list[Context]]:
    batches: list[list[Context]] = [[]]
    for each in contexts:
        if batches[-1] and sum(len(some.inputs) for some in batches[-1]) + len(each.inputs) > _STEP_TOKENS:
            batches.append([])
        batches[-1].append(each)
    return batches
