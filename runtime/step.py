"""Building a step: from the scheduled chunks to the tensors and lengths that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.rope import RopeTables
from .ops import Decode, Lengths, Merge, Ops, Positions, Prefill, PrefixSegment, Step
from .transfer import to_device


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence to run: `token_ids` have the positions `start`, `start + 1`, …

    blocks: the sequence's blocks, up to that of the chunk's last token. Without blocks nothing is cached, which only a
    whole sequence in one chunk can do. all_rows: compute logits of every token. last_row: compute those of the last.
    absorbed: attend to the cache alone (latent attention in absorbed form), the chunk's own tokens included.
    """

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    last_row: bool = True
    all_rows: bool = False
    absorbed: bool = False

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)

    @property
    def decodes(self) -> bool:
        """True for attention in absorbed form: one token after others, or a chunk with `absorbed`."""
        return self.absorbed or (self.start > 0 and len(self.token_ids) == 1)

    @property
    def rank(self) -> int:
        """Place in a step: decodes, then chunks that continue a sequence, then those that begin one."""
        return 0 if self.decodes else 1 if self.start else 2


@dataclass(frozen=True)
class RopeRows:
    """Rope tables whose rows a step gathers: compute dtype `[max_position, D]`, halves duplicated."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, tables: RopeTables, ops: Ops) -> RopeRows:
        cos, sin = (torch.from_numpy(table).repeat(1, 2) for table in (tables.cos, tables.sin))
        return cls(ops.weights.parameter(cos, ops.dtype), ops.weights.parameter(sin, ops.dtype))

    @property
    def max_position(self) -> int:
        return self.cos.shape[0]


@dataclass(frozen=True)
class Inputs:
    """Inputs of a step that the device reads, on the host and then on the device."""

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    decode: Decode | None
    prefill: Prefill | None
    output_rows: Tensor | None


class StepBuilder:
    """Builder of steps for one engine.

    segment_tokens: cached tokens to decompress at a time. dense_tokens: a step with a longer sequence is
    absorbed as a whole; None: none is (`AttentionKind.dense_tokens`). continues_on_pages: of the kind of attention.
    """

    def __init__(
        self,
        ops: Ops,
        rope: RopeRows,
        block_size: int,
        segment_tokens: int,
        dense_tokens: int | None = None,
        continues_on_pages: bool = False,
    ):
        self._ops = ops
        self._rope = rope
        self.block_size = block_size
        self._segment_blocks = max(1, segment_tokens // block_size)
        self._dense_tokens, self._continues_on_pages = dense_tokens, continues_on_pages

    def build(self, chunks: Sequence[Chunk]) -> tuple[Step, list[int]]:
        """Build the step of some chunks: the step, and the chunks' order in its rows (by rank, else as given).

        Raises ValueError for a chunk without tokens, beyond the rope tables, or with too few blocks.
        """
        on_host, order = self.inputs(chunks)
        return self.step(self.to_device(on_host)), order

    def inputs(self, chunks: Sequence[Chunk], table_width: int = 1) -> tuple[Inputs, list[int]]:
        """Make a step's inputs on the host, and the chunks' order. Raises as `build` does.

        table_width: the least number of columns of the decodes' block table.
        """
        longest = max((chunk.end for chunk in chunks), default=0)
        selects = self._dense_tokens is not None and longest > self._dense_tokens
        if selects or self._continues_on_pages:
            chunks = [replace(chunk, absorbed=True) if selects or chunk.start else chunk for chunk in chunks]
        for chunk in chunks:
            self._check(chunk)
        order = sorted(range(len(chunks)), key=lambda index: chunks[index].rank)
        ordered = [chunks[index] for index in order]
        decodes = [chunk for chunk in ordered if chunk.decodes]
        made = Inputs(
            token_ids=_int64([token for chunk in ordered for token in chunk.token_ids]),
            positions=_int64([p for chunk in ordered for p in range(chunk.start, chunk.end)]),
            slots=_int64([slot for chunk in ordered for slot in self._slots(chunk)]),
            decode=self._decode(decodes, selects, table_width) if decodes else None,
            prefill=self._prefill(ordered[len(decodes) :]) if len(decodes) < len(ordered) else None,
            output_rows=_output_rows(ordered),
        )
        return made, order

    def to_device(self, on_host: Inputs, into: Tensor | None = None) -> Inputs:
        """Bring inputs to the device, all in one copy. into: the buffer to overwrite, as in `transfer.to_device`."""
        return to_device(on_host, self._ops.device, self._ops.pinned, into)

    def step(self, inputs: Inputs) -> Step:
        """Make the step of inputs on the device: gathers the rows of the rope tables."""
        return Step(
            token_ids=inputs.token_ids,
            positions=Positions(
                slots=inputs.slots,
                cos=self._rope.cos.index_select(0, inputs.positions),
                sin=self._rope.sin.index_select(0, inputs.positions),
            ),
            decode=inputs.decode,
            prefill=inputs.prefill,
            output_rows=inputs.output_rows,
        )

    def _check(self, chunk: Chunk) -> None:
        if not 0 <= chunk.start < chunk.end <= self._rope.max_position:
            raise ValueError(
                f"a chunk of positions {chunk.start} to {chunk.end}; the rope tables have {self._rope.max_position}"
            )
        cached = bool(chunk.blocks) or chunk.start > 0 or chunk.absorbed
        if cached and len(chunk.blocks) * self.block_size < chunk.end:
            raise ValueError(f"{len(chunk.blocks)} blocks of {self.block_size} tokens for a chunk up to {chunk.end}")

    def _slots(self, chunk: Chunk) -> list[int]:
        if not chunk.blocks:
            return [-1] * len(chunk.token_ids)
        size = self.block_size
        return [chunk.blocks[p // size] * size + p % size for p in range(chunk.start, chunk.end)]

    def _decode(self, chunks: Sequence[Chunk], selects: bool, table_width: int) -> Decode:
        make = Decode.selecting if selects else Decode
        entries = [entry for chunk in chunks for entry in self._entries(chunk, selects)]
        return make(
            q_lens=tuple(accumulate(count for _, count, _ in entries)),
            kv_lens=tuple(end for _, _, end in entries),
            block_table=_block_table([self._used_blocks(blocks, 0, end) for blocks, _, end in entries], table_width),
        )

    def _entries(self, chunk: Chunk, selects: bool) -> list[tuple[Sequence[int], int, int]]:
        """Blocks, number of queries and past-the-last position of a chunk, or of parts that the backend takes."""
        most = None if selects or self._continues_on_pages else self._ops.mla.most_queries
        stride = len(chunk.token_ids) if most is None else most
        ends = [*range(chunk.start + stride, chunk.end, stride), chunk.end]
        return [(chunk.blocks, end - start, end) for start, end in pairwise([chunk.start, *ends])]

    def _prefill(self, chunks: Sequence[Chunk]) -> Prefill:
        ends = tuple(accumulate(len(chunk.token_ids) for chunk in chunks))
        continued = [chunk for chunk in chunks if chunk.start]
        packed = self._packed(continued)
        segments = tuple(self._segment(continued, [0, *ends], runs) for runs in packed)
        return Prefill(Lengths(ends, ends, causal=True), segments, _merges([0, *ends], packed))

    def _packed(self, chunks: Sequence[Chunk]) -> list[list[_Run]]:
        """Runs of the chunks' cached tokens, as many in a segment as it may hold.

        A sequence is cut at multiples of a segment, whatever other sequences there are.
        """
        stride = self._segment_blocks * self.block_size
        packed: list[list[_Run]] = []
        held = stride
        for index, chunk in enumerate(chunks):
            for start in range(0, chunk.start, stride):
                run = _Run(index, start, min(start + stride, chunk.start))
                if held + run.end - run.start > stride:
                    packed.append([])
                    held = 0
                packed[-1].append(run)
                held += run.end - run.start
        return packed

    def _segment(self, chunks: Sequence[Chunk], bounds: Sequence[int], runs: Sequence[_Run]) -> PrefixSegment:
        blocks = [self._used_blocks(chunks[run.chunk].blocks, run.start, run.end) for run in runs]
        firsts = accumulate((len(used) * self.block_size for used in blocks), initial=0)
        kept = [row for first, run in zip(firsts, runs, strict=False) for row in range(first, first + run.length)]
        first, past = bounds[runs[0].chunk], bounds[runs[-1].chunk + 1]
        return PrefixSegment(
            rows=(first, past),
            lengths=Lengths(
                q_lens=tuple(bounds[run.chunk + 1] - first for run in runs),
                kv_lens=tuple(accumulate(run.length for run in runs)),
                causal=False,
            ),
            blocks=_int32([block for used in blocks for block in used]),
            kept=None if kept[-1] == len(kept) - 1 else _int64(kept),
        )

    def _used_blocks(self, blocks: Sequence[int], start: int, end: int) -> list[int]:
        return list(blocks[start // self.block_size : -(-end // self.block_size)])


class _Run(NamedTuple):
    """Cached tokens `[start, end)` of the sequence of one chunk; `start` is a multiple of the block size."""

    chunk: int
    start: int
    end: int

    @property
    def length(self) -> int:
        return self.end - self.start


def _merges(bounds: Sequence[int], packed: Sequence[Sequence[_Run]]) -> tuple[Merge, ...]:
    """Rows by the segments that they attend to. bounds: where the chunks begin, and where the last one ends."""
    seen: dict[int, list[int]] = {}
    for segment, runs in enumerate(packed):
        for run in runs:
            seen.setdefault(run.chunk, []).append(segment)
    merges = []
    for segments, same in groupby(seen, key=lambda chunk: seen[chunk]):
        alike = list(same)
        merges.append(Merge((bounds[alike[0]], bounds[alike[-1] + 1]), tuple(segments)))
    return tuple(merges)


def _output_rows(chunks: Sequence[Chunk]) -> Tensor | None:
    rows: list[int] = []
    first = 0
    for chunk in chunks:
        end = first + len(chunk.token_ids)
        if chunk.all_rows:
            rows.extend(range(first, end))
        elif chunk.last_row:
            rows.append(end - 1)
        first = end
    return None if len(rows) == first else _int64(rows)


def _block_table(rows: Sequence[Sequence[int]], least_width: int) -> Tensor:
    table = torch.zeros(len(rows), max(least_width, *map(len, rows)), dtype=torch.int32)
    for place, row in zip(table, rows, strict=True):  # a list of all entries, mostly zeros, would take longer
        place[: len(row)] = torch.tensor(row, dtype=torch.int32)
    return table


def _int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
