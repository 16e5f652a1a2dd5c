"""Scheduling of the next step: every decoding sequence, then as much prefill as the budget leaves, in order of arrival.

So at most one sequence stands between two chunks of its prompt.

A sequence that enters takes the known blocks that hold its first tokens, and gets blocks for the others; later it gets
one block more for each that it fills. When no block is free, the sequence that entered last is preempted: it gives up
its blocks and waits, to be recomputed as far as they are gone by then.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

from .block_manager import BlockManager
from .sequence import Sequence
from .step_budget import StepBudget


@dataclass(frozen=True)
class Scheduled:
    """The next `count` uncached tokens of a sequence."""

    sequence: Sequence
    count: int

    @property
    def samples(self) -> bool:
        """True if the step reaches the sequence's newest token: then the next token can be sampled."""
        return self.count == self.sequence.num_pending


class Scheduler:
    """Waiting and running sequences, first come, first served."""

    def __init__(self, blocks: BlockManager, max_num_seqs: int, budget: StepBudget):
        self._blocks = blocks
        self._max_num_seqs = max_num_seqs
        self._budget = budget
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self.num_preempted = 0

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's tokens: never none while a sequence waits or runs."""
        chosen = [Scheduled(sequence, 1) for sequence in self._grow_decoding()]
        budget = self._budget.prefill_tokens(len(chosen))
        for sequence in self._running:
            if not sequence.is_decoding and budget > 0:
                chosen.append(Scheduled(sequence, min(budget, sequence.num_pending)))
                budget -= chosen[-1].count
        for sequence in list(self._waiting):
            if sequence.waits_for_leader:
                continue
            if budget <= 0 or not self._enter(sequence):
                break
            self._waiting.remove(sequence)
            chosen.append(Scheduled(sequence, min(budget, sequence.num_pending)))
            budget -= chosen[-1].count
        return chosen

    def finish(self, sequence: Sequence) -> None:
        """Remove a waiting, running or finished sequence and free its blocks."""
        if sequence in self._running:
            self._running.remove(sequence)
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        self._release(sequence)

    def reset(self) -> None:
        """Forget every sequence, without freeing blocks: `BlockManager.reset` does that."""
        self._waiting.clear()
        self._running.clear()

    def _grow_decoding(self) -> list[Sequence]:
        """Make room for the newest token of decoding sequences, preempting as few as needed: those that decode."""
        for sequence in list(self._running):
            if sequence.is_decoding and sequence in self._running:
                self._grow(sequence)
        return [sequence for sequence in self._running if sequence.is_decoding]

    def _grow(self, sequence: Sequence) -> None:
        missing = self._blocks.blocks_for(len(sequence.tokens)) - len(sequence.blocks)
        while missing > 0:
            allocated = self._blocks.allocate(missing)
            if allocated is not None:
                sequence.blocks.extend(allocated)
                return
            last = self._running[-1]
            self._preempt(last)
            if last is sequence:
                return

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.num_preempted += 1

    def _enter(self, sequence: Sequence) -> bool:
        if len(self._running) >= self._max_num_seqs:
            return False
        matched, keys = self._blocks.match(sequence.known_tokens, sequence.salt)
        allocated = self._blocks.allocate(self._blocks.blocks_for(len(sequence.tokens)) - len(matched))
        if allocated is None:
            self._blocks.release(matched)
            return False
        sequence.blocks = matched + allocated
        sequence.keys = keys
        sequence.num_cached = len(matched) * self._blocks.block_size
        if sequence.num_reused is None:
            sequence.num_reused = sequence.num_cached
            sequence.entered_at = time.perf_counter()
        self._running.append(sequence)
        return True

    def _release(self, sequence: Sequence) -> None:
        self._blocks.release(sequence.blocks)
        sequence.blocks = []
        sequence.keys = []
        sequence.num_cached = 0
