"""The attention of one layer: calibrated linear by linear, each on the outputs of the quantized ones before it.

The block is the runtime's. The family's table gives the linears that share inputs, their order, and the pairs whose
channels can be rescaled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ....formats.schemes import Scheme
from ....models.family import Block, Entry
from ....models.roles import QUANTIZABLE
from ....quant.smoothing import power_of_two
from ....runtime.attention.kind import Attended, AttentionKind
from ....runtime.ops import Activation, AttentionWeights
from ....runtime.step import Chunk, StepBuilder
from ..context import Layer, Walk
from ..states import StreamPair
from .kv_cache import LatentScale, search_scale
from .operators import Deployed, ReachedError, Recording
from .smooth import Change, choose, deployed, norm_quotient, spread


@dataclass(frozen=True)
class Weights:
    """Weights of the block by part, as the runtime loads them (`runtime.attention.kind.Parts`): float32 `tensors`, and
    `linears` in place of those that are quantized or recording."""

    tensors: Mapping[str, Tensor]
    linears: Mapping[str, Deployed] = field(default_factory=dict)

    def linear(self, part: str) -> Deployed:
        return self.linears.get(part) or Deployed(part, Scheme.FLOAT, self.tensors[part])

    def tensor(self, part: str) -> Tensor:
        return self.tensors[part]

    def having(self, linears: Mapping[str, Deployed]) -> Weights:
        """The block with these linears in place of its own."""
        return replace(self, linears={**self.linears, **linears})


class AttentionBlock:
    """The runtime's attention of one layer, in float32 on batches of whole samples."""

    def __init__(self, layer: Layer):
        family = layer.tensors.family
        self._walk = walk = layer.walk
        self._layer = layer
        # Attention that selects tokens finds them in a cache, one block a sample; else nothing is cached.
        self._selects = walk.selections is not None
        self._block_size = walk.sequence_length if self._selects else 1
        self._steps = StepBuilder(walk.ops, walk.rope, self._block_size, 1, walk.attention.dense_tokens)
        self._dense_steps = StepBuilder(walk.ops, walk.rope, 1, 1)
        self._dense_cache = walk.ops.caches.new(walk.dense.pools(layer.index), 1, 1)
        self.entries = [entry for entry in family.entries(Block.ATTENTION) if layer.has(Block.ATTENTION, entry.part)]
        # Linears by the activation that they read, in the order of computation.
        self.stages: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if entry.kind == "linear" and entry.role in QUANTIZABLE:
                self.stages.setdefault(entry.reads[0], []).append(entry)
        norm = family.norm_of(next(iter(self.stages)))
        assert norm is not None
        self.norm = norm[1]

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of every entry, and of the norm before the block."""
        return {entry.part: self._layer.weight(self.place(entry), entry.part) for entry in [self.norm, *self.entries]}

    def place(self, entry: Entry) -> Block:
        return Block.LAYER if entry is self.norm else Block.ATTENTION

    def attend(self, weights: Weights, x: Tensor, selected: Tensor | None) -> Attended:
        """The block's output, to be added to the residual stream x `[T, H]`, and what it hands on. selected: what the
        layer below handed on."""
        kind, ops, count = self._walk.attention, self._walk.ops, x.shape[0] // self._walk.sequence_length
        hidden, loaded = self._start(kind, weights, x)
        # Threads share the block: where tokens are cached, each call has a cache of its own.
        cache = self._dense_cache
        if self._selects:
            cache = ops.caches.new(kind.pools(self._layer.index), count, self._block_size)
        step, _ = self._steps.build([self._sample((index,) if self._selects else ()) for index in range(count)])
        return kind.attend(hidden, loaded, cache, step, ops, selected)

    def output(self, weights: Weights, x: Tensor, selected: Tensor | None) -> Tensor:
        """The output of `attend`."""
        return self.attend(weights, x, selected).output

    def inputs(self, weights: Weights, activation: str, x: Tensor, selected: Tensor | None) -> Tensor:
        """The inputs `[T, K]` of the linears that read an activation, for the arguments of `attend`."""
        first = self.stages[activation][0].part
        try:
            self.attend(weights.having({first: Recording(first, Scheme.FLOAT, weights.tensors[first])}), x, selected)
        except ReachedError as reached:
            return reached.inputs
        raise AssertionError(f"attention does not read {first}")

    def cached(self, weights: Weights, x: Tensor) -> dict[str, Tensor]:
        """The contents of the KV cache for the residual stream x `[T, H]`, by pool: `[T, channels]`."""
        kind, ops, count = self._walk.dense, self._walk.ops, x.shape[0] // self._walk.sequence_length
        step, _ = self._dense_steps.build([self._sample(())] * count)
        return kind.write(*self._start(kind, weights, x), self._dense_cache, step, ops)

    def handed(self, selected: Tensor | None, batch: slice) -> Tensor | None:
        """The selection handed on from below to a batch; None for a layer that selects by itself, or attends to all."""
        takes = self._walk.config.attention.takes_selection(self._layer.index)
        return selected[batch] if selected is not None and takes else None

    def _start(self, kind: AttentionKind, weights: Weights, x: Tensor) -> tuple[Activation, AttentionWeights]:
        """The start of the block: normed rows and loaded weights."""
        ops = self._walk.ops
        loaded = kind.load(self._layer.index, weights, ops)
        hidden, _ = kind.norm(None, x, weights.tensor(self.norm.part), loaded, ops)
        return hidden, loaded

    def _sample(self, blocks: Sequence[int]) -> Chunk:
        # Token ids matter to the embedding alone.
        return Chunk(range(self._walk.sequence_length), 0, blocks, all_rows=True)


def run_attention(layer: Layer, streams: StreamPair, out: StreamPair) -> tuple[dict[str, float], LatentScale | None]:
    """Quantize a layer's attention and write both streams after it into `out`.

    Returns smoothing strengths, if any, and the scales for an int8 KV cache; None for attention that cannot have one.
    """
    walk, block = layer.walk, AttentionBlock(layer)
    float_selected, quantized_selected = _selections(walk)
    tensors = block.tensors()
    strengths = _smooth(layer, block, tensors, streams) if walk.smooth else {}
    floats = Weights(tensors)
    quantized = _quantize(layer, block, floats, streams)

    def step(batch: slice) -> None:
        for stream, result, weights, selected in (
            (streams.floats, out.floats, floats, float_selected),
            (streams.quantized, out.quantized, quantized, quantized_selected),
        ):
            attended = block.attend(weights, stream[batch], block.handed(selected, batch))
            result[batch] = stream[batch] + attended.output
            if selected is not None and attended.selected is not None:
                selected[batch] = attended.selected

    walk.pool.each(step, walk.batches)
    for index, batch in enumerate(walk.batches):
        for result in (out.floats, out.quantized, float_selected, quantized_selected):
            if result is not None:
                walk.pool.share(index, result[batch])
    if not walk.config.attention.cache_scales:
        return strengths, None
    (pool,) = [pool.name for pool in walk.dense.pools(layer.index) if pool.int8]
    scale = search_scale(lambda batch: block.cached(quantized, streams.quantized[batch])[pool], walk.batches, walk.pool)
    return strengths, scale


def _selections(walk: Walk) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Selections handed on in the float model and in the quantized one; None where attention selects nothing."""
    return (None, None) if walk.selections is None else (walk.selections.floats, walk.selections.quantized)


def _quantize(layer: Layer, block: AttentionBlock, floats: Weights, streams: StreamPair) -> Weights:
    batches, stream = layer.walk.batches, streams.quantized
    _, selected = _selections(layer.walk)
    quantized = {entry.part for stage in block.stages.values() for entry in stage}
    kept = {
        entry.part: layer.keep(block.place(entry), entry.part, floats.tensors[entry.part])
        for entry in [block.norm, *block.entries]
        if entry.part not in quantized
    }
    found = replace(floats, tensors={**floats.tensors, **kept})
    for activation, stage in block.stages.items():

        def inputs(index: int, weights: Weights = found, activation: str = activation) -> Tensor:
            return block.inputs(weights, activation, stream[batches[index]], block.handed(selected, batches[index]))

        jobs = [layer.job(Block.ATTENTION, entry.part) for entry in stage]
        linears = layer.quantize(jobs, [floats.tensors[entry.part] for entry in stage], inputs)
        found = found.having({entry.part: linear for entry, linear in zip(stage, linears, strict=True)})
    return found


def _smooth(layer: Layer, block: AttentionBlock, tensors: dict[str, Tensor], streams: StreamPair) -> dict[str, float]:
    """Rescale input channels of linears, in `tensors`: between a norm and its readers, and between the values of
    attention and the linear that reads them.

    Each strength leaves the least error at the block's output on the first batch, given the steps before it.
    """
    family = layer.tensors.family
    selections, _ = _selections(layer.walk)
    x, selected = streams.floats[layer.walk.batches[0]], block.handed(selections, layer.walk.batches[0])
    truth = block.output(Weights(tensors), x, selected)
    strengths = {}

    def error(changed: dict[str, Tensor], readers: tuple[str, ...]) -> float:
        trial = tensors | changed
        linears = {part: deployed(layer.job(Block.ATTENTION, part), trial[part]) for part in readers}
        return float((block.output(Weights(trial, linears), x, selected) - truth).double().square().sum())

    def largest(activation: str) -> Tensor:
        weights, most = Weights(tensors), None
        for found in layer.walk.pool.map(
            lambda batch: (
                block.inputs(weights, activation, streams.floats[batch], block.handed(selections, batch)).abs().amax(0)
            ),
            layer.walk.batches,
        ):
            most = found if most is None else torch.maximum(most, found)
        assert most is not None
        return most

    for activation, stage in block.stages.items():
        readers = tuple(entry.part for entry in stage)
        norm = family.norm_of(activation)
        change: Change
        shared = (1, 1)
        if norm is not None:
            place, entry = norm
            # Readers that stay float must take the scale back too.
            every = tuple(found.part for found in family.readers(activation, Block.ATTENTION) if found in block.entries)
            change = _norm_change(layer, tensors, place, entry.part, every)
            key = layer.spec(place, entry.part).module
        else:
            writers = [entry for entry in block.entries if entry.writes == activation]
            change, shared = _value_change(layer, tensors, writers, readers)
            key = layer.spec(Block.ATTENTION, readers[0]).module
        strengths[key] = choose(largest(activation), tensors, readers, change, error, layer.walk.pool, shared)
    return strengths


def _norm_change(layer: Layer, tensors: dict[str, Tensor], place: Block, norm: str, readers: tuple[str, ...]) -> Change:
    """A function of a scale `[K]`: the norm's gain divided by it, and its readers multiplied to match.

    Readers that stay float keep their precision times a power of two alone.
    """
    family = layer.tensors.family
    rounds = any(family.entry(Block.ATTENTION, part).role not in QUANTIZABLE for part in readers)

    def change(scale: Tensor) -> dict[str, Tensor]:
        scale = power_of_two(scale) if rounds else scale
        smaller, factor = norm_quotient(layer.walk.linears, layer.job(place, norm), tensors[norm], scale)
        return {norm: smaller, **{part: tensors[part] * factor for part in readers}}

    return change


def _value_change(
    layer: Layer, tensors: dict[str, Tensor], writers: Sequence[Entry], readers: tuple[str, ...]
) -> tuple[Change, tuple[int, int]]:
    """A function of a scale for each channel of the values: their linear's rows and bias divided by it, and their
    readers' columns multiplied. With it `choose`'s `shared`: several heads of a reader may read one head of values.
    """
    sizes = layer.tensors.sizes
    (linear,) = [entry for entry in writers if entry.kind == "linear"]
    weight, size = tensors[linear.part], layer.tensors.family.activation(linear.writes or "").size
    width, (inputs,) = sizes[size or ""], {tensors[part].shape[1] for part in readers}
    rows, first = (sizes[word] for word in linear.heads) if linear.heads else (width, 0)
    heads = weight.shape[0] // rows
    shared = inputs // (heads * width), width

    def divided(tensor: Tensor, scale: Tensor) -> Tensor:
        by_head = tensor.double().view(heads, rows, -1).clone()
        by_head[:, first:] /= scale.view(heads, width, 1)
        return by_head.view(tensor.shape).float()

    def change(scale: Tensor) -> dict[str, Tensor]:
        scale = power_of_two(scale)
        columns = spread(scale, shared)
        readers_changed = {part: (tensors[part].double() * columns).float() for part in readers}
        return {**{entry.part: divided(tensors[entry.part], scale) for entry in writers}, **readers_changed}

    return change, shared
