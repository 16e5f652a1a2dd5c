"""Building a step: from the scheduled chunks to the tensors and lengths that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from ..models.rope import RopeTables
from .ops import Decode, Ops, Positions, Prefill, Prefix, PrefixSegment, Step


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence to run: `token_ids` have the positions `start`, `start + 1`, …

    blocks: the sequence's blocks, up to that of the chunk's last token. Without blocks nothing is cached, which only a
    whole sequence in one chunk can do. all_rows: compute logits of every token. last_row: compute those of the last.
    absorbed: attend to the cache alone, in absorbed form, the chunk's own tokens included.
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


@dataclass(frozen=True)
class RopeRows:
    """Rope tables whose rows a step gathers: compute dtype `[max_position, D]`, halves duplicated."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, tables: RopeTables, ops: Ops) -> RopeRows:
        cos, sin = (torch.cat([table, table], dim=-1) for table in (tables.cos, tables.sin))
        return cls(ops.weights.parameter(cos, ops.dtype), ops.weights.parameter(sin, ops.dtype))

    @property
    def max_position(self) -> int:
        return self.cos.shape[0]


class StepBuilder:
    """Builder of steps for one engine.

    segment_tokens: tokens of a cached prefix to decompress at a time. dense_tokens: a step with a longer sequence is
    absorbed as a whole; None: none is (`AttentionKind.dense_tokens`).
    """

    def __init__(self, ops: Ops, rope: RopeRows, block_size: int, segment_tokens: int, dense_tokens: int | None = None):
        self._ops = ops
        self._rope = rope
        self._block_size = block_size
        self._segment_blocks = max(1, segment_tokens // block_size)
        self._dense_tokens = dense_tokens

    def build(self, chunks: Sequence[Chunk]) -> tuple[Step, list[int]]:
        """Build the step of some chunks: the step, and the chunks' order in its rows (decodes first, else as given).

        Raises ValueError for a chunk without tokens, beyond the rope tables, or with too few blocks.
        """
        longest = max((chunk.end for chunk in chunks), default=0)
        selects = self._dense_tokens is not None and longest > self._dense_tokens
        if selects:
            chunks = [replace(chunk, absorbed=True) for chunk in chunks]
        for chunk in chunks:
            self._check(chunk)
        order = sorted(range(len(chunks)), key=lambda index: not chunks[index].decodes)
        ordered = [chunks[index] for index in order]
        decodes = [chunk for chunk in ordered if chunk.decodes]
        positions = self._tensor([p for chunk in ordered for p in range(chunk.start, chunk.end)])
        step = Step(
            token_ids=self._tensor([token for chunk in ordered for token in chunk.token_ids]),
            positions=Positions(
                slots=self._tensor([slot for chunk in ordered for slot in self._slots(chunk)]),
                cos=self._rope.cos[positions],
                sin=self._rope.sin[positions],
            ),
            decode=self._decode(decodes, selects) if decodes else None,
            prefill=self._prefill(ordered[len(decodes) :]) if len(decodes) < len(ordered) else None,
            output_rows=self._output_rows(ordered),
        )
        return step, order

    def _check(self, chunk: Chunk) -> None:
        if not 0 <= chunk.start < chunk.end <= self._rope.max_position:
            raise ValueError(
                f"a chunk of positions {chunk.start} to {chunk.end}; the rope tables have {self._rope.max_position}"
            )
        cached = bool(chunk.blocks) or chunk.start > 0 or chunk.absorbed
        if cached and len(chunk.blocks) * self._block_size < chunk.end:
            raise ValueError(f"{len(chunk.blocks)} blocks of {self._block_size} tokens for a chunk up to {chunk.end}")

    def _slots(self, chunk: Chunk) -> list[int]:
        if not chunk.blocks:
            return [-1] * len(chunk.token_ids)
        size = self._block_size
        return [chunk.blocks[p // size] * size + p % size for p in range(chunk.start, chunk.end)]

    def _decode(self, chunks: Sequence[Chunk], selects: bool) -> Decode:
        make = Decode.selecting if selects else Decode
        return make(
            q_lens=tuple(accumulate(len(chunk.token_ids) for chunk in chunks)),
            kv_lens=tuple(chunk.end for chunk in chunks),
            block_table=self._block_table([self._used_blocks(chunk.blocks, 0, chunk.end) for chunk in chunks]),
        )

    def _prefill(self, chunks: Sequence[Chunk]) -> Prefill:
        ends = tuple(accumulate(len(chunk.token_ids) for chunk in chunks))
        prefixes = tuple(
            Prefix((end - len(chunk.token_ids), end), self._segments(chunk))
            for end, chunk in zip(ends, chunks, strict=True)
            if chunk.start
        )
        return Prefill(ends, prefixes)

    def _segments(self, chunk: Chunk) -> tuple[PrefixSegment, ...]:
        stride = self._segment_blocks * self._block_size
        ranges = [(start, min(start + stride, chunk.start)) for start in range(0, chunk.start, stride)]
        return tuple(
            PrefixSegment(start, end - start, self._block_table([self._used_blocks(chunk.blocks, start, end)]))
            for start, end in ranges
        )

    def _used_blocks(self, blocks: Sequence[int], start: int, end: int) -> list[int]:
        return list(blocks[start // self._block_size : -(-end // self._block_size)])

    def _block_table(self, rows: Sequence[Sequence[int]]) -> Tensor:
        width = max(len(row) for row in rows)
        padded = [[*row, *[0] * (width - len(row))] for row in rows]
        return torch.tensor(padded, dtype=torch.int32).to(self._ops.device, non_blocking=True)

    def _output_rows(self, chunks: Sequence[Chunk]) -> Tensor | None:
        rows: list[int] = []
        first = 0
        for chunk in chunks:
            end = first + len(chunk.token_ids)
            if chunk.all_rows:
                rows.extend(range(first, end))
            elif chunk.last_row:
                rows.append(end - 1)
            first = end
        return None if len(rows) == first else self._tensor(rows)

    def _tensor(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(self._ops.device, non_blocking=True)
