"""Decode steps that run as captured graphs: one graph for each batch size, its inputs overwritten before each replay.

A step is captured if every sequence adds one token to others: then its operators, and the shapes of their tensors,
depend on the number of sequences alone. It is padded to the next captured size with tokens of a block that belongs to
no sequence. Prefill chunks run eagerly, and so do steps of several ranks, whose exchanges are not captured.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import NpuqWarning
from ...inputs.printable import error_line
from ..attention.pools import LayerCache
from ..model import Model
from ..ops.graphs import Graphs, StepGraph
from ..step import Chunk, Inputs, StepBuilder
from ..transfer import packed_size
from .sizes import graph_sizes


@dataclass(frozen=True)
class _Captured:
    """One captured step. inputs: on the device, views of `buffer`; the graph reads them."""

    graph: StepGraph
    inputs: Inputs
    buffer: Tensor


class DecodeGraphs:
    """The captured decode steps of one engine.

    table_width: blocks of the longest sequence. spare_block: a block that no sequence owns, which padding writes.
    A model that selects tokens has two graphs a size: for steps with a sequence above the selection, and for others.
    The first failure, of a capture or of a replay, is said in a NpuqWarning, and from then on all steps run eagerly.
    """

    def __init__(
        self,
        model: Model,
        graphs: Graphs,
        cache: Sequence[LayerCache],
        builder: StepBuilder,
        max_num_seqs: int,
        table_width: int,
        spare_block: int,
    ):
        self._model, self._graphs, self._cache, self._builder = model, graphs, cache, builder
        self._table_width, self._spare_block = table_width, spare_block
        self.sizes = graph_sizes(max_num_seqs)
        self._captured: dict[tuple[int, bool], _Captured] = {}
        try:
            # The largest first: the others find room in its memory.
            for size in reversed(self.sizes):
                for selects in self._kinds():
                    self._captured[size, selects] = self._capture(size, selects)
        except Exception as error:
            self._give_up("captured", error)

    @property
    def active(self) -> bool:
        """True while decode steps run as graphs."""
        return bool(self._captured)

    def run(self, chunks: Sequence[Chunk]) -> Tensor | None:
        """Logits of a step's chunks, `[chunks, vocab]`, overwritten by the next step; None if it must run eagerly."""
        if not self._captured or len(chunks) > self.sizes[-1] or not all(_adds_one_token(chunk) for chunk in chunks):
            return None
        size = next(size for size in self.sizes if size >= len(chunks))
        inputs, _ = self._builder.inputs([*chunks, *self._padding(size - len(chunks))], self._table_width)
        assert inputs.decode is not None
        captured = self._captured[size, inputs.decode.device_lens is not None]
        try:
            self._builder.to_device(inputs, captured.buffer)
            captured.graph.replay(inputs.decode.kv_lens)
        except Exception as error:
            self._give_up("replayed", error)
            return None  # the step runs again, eagerly, and writes the same rows into the cache
        return captured.graph.output[: len(chunks)]

    def _kinds(self) -> tuple[bool, ...]:
        dense = self._model.attention.dense_tokens
        longest = self._table_width * self._builder.block_size
        return (False,) if dense is None or dense >= longest else (False, True)

    def _capture(self, size: int, selects: bool) -> _Captured:
        inputs, _ = self._builder.inputs(self._example(size, selects), self._table_width)
        buffer = torch.zeros(packed_size(inputs), dtype=torch.uint8, device=self._model.ops.device)
        on_device = self._builder.to_device(inputs, buffer)

        def run() -> Tensor:
            return self._model.forward(self._builder.step(on_device), self._cache)

        run()  # what an operator sets up on its first call is no part of the graph
        return _Captured(self._graphs.capture(run), on_device, buffer)

    def _example(self, size: int, selects: bool) -> list[Chunk]:
        """A step of padding alone; if it selects, its first sequence is just long enough."""
        padding = self._padding(size)
        dense = self._model.attention.dense_tokens
        if not selects or dense is None:
            return padding
        blocks = [self._spare_block] * (dense // self._builder.block_size + 1)
        return [Chunk([0], dense, blocks), *padding[1:]]

    def _padding(self, count: int) -> list[Chunk]:
        return [Chunk([0], 0, [self._spare_block], absorbed=True)] * count

    def _give_up(self, what: str, error: Exception) -> None:
        self._captured.clear()
        warnings.warn(
            f"the decode step cannot be {what} as a graph and runs eagerly: {error_line(error)}", NpuqWarning, 2
        )


def _adds_one_token(chunk: Chunk) -> bool:
    return chunk.start > 0 and len(chunk.token_ids) == 1 and (chunk.last_row or chunk.all_rows)
