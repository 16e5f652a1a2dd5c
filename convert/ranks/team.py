"""The ranks of a torchrun launch as one conversion: they agree, show one progress, wait for each other.

Shards, journals and claims are theirs on the shared file system, as those of jobs that know nothing of each other; the
network carries words and sums.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Final

import torch

from ...inputs.printable import printable
from ...progress import Progress, Task
from ...runtime.ranks.group import Group
from ...runtime.ranks.world import World
from .run import Run
from .share import Share

_TELL_SECONDS: Final = 1.0


class Team:
    """This process among the ranks of a launch. `progress`: where it reports; rank 0 shows what all report.

    Every rank calls the methods in the same order.
    """

    def __init__(self, world: World, progress: Progress):
        self._world = world
        self.share = Share(world.launch.rank, world.launch.size)
        self.progress: Progress = Together(progress) if world.leads else Told(world)
        self._run: Run | None = None
        if isinstance(self.progress, Together):
            world.listen(self.progress.hear)

    @property
    def leads(self) -> bool:
        return self._world.leads

    @property
    def group(self) -> Group:
        return self._world.group

    def agree(self, identity: Mapping[str, str]) -> None:
        """Raise RankError on every rank where the ranks would make different artifacts."""
        for name in sorted(identity):
            self._world.agree(f"{name} to convert with", identity[name], "give all of them the same source and options")

    def whole(self, task: Task) -> Task:
        """The sum of a task of each rank; its layers are not counted."""
        numbers = [task.total, task.done, round(task.effort or 0), round(task.effort_done)]
        total, done, effort, effort_done = self._world.group.all_reduce_sum(torch.tensor(numbers)).tolist()
        return replace(task, total=total, done=done, effort=effort, effort_done=effort_done, layers=0, layers_done=0)

    def works(self, run: Run) -> None:
        """Remember the run of this process, for `release`."""
        self._run = run

    def release(self) -> None:
        """Give this rank's shards back, before the process ends because another rank did."""
        if self._run is not None:
            self._run.end()

    def meet(self) -> None:
        """Return when all ranks have called this."""
        if isinstance(self.progress, Told):
            self.progress.flush()
        self._world.group.barrier()

    def part(self) -> None:
        """End the launch, once all ranks have called this."""
        self._world.part_ways()


class Together:
    """A receiver on rank 0: its own progress, and what the others tell, as one task."""

    def __init__(self, shown: Progress):
        self._shown = shown
        self._lock = threading.Lock()
        self._heard: dict[int, tuple[int, float]] = {}
        self._counting = False

    def start(self, task: Task, /) -> None:
        with self._lock:
            self._shown.start(task)
            self._counting = task.name == "convert"
            if self._counting:
                self._catch_up(dict.fromkeys(self._heard, (0, 0.0)))

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        with self._lock:
            self._shown.advance(count, effort=effort)

    def note(self, text: str, /) -> None:
        self._shown.note(text)

    def hear(self, rank: int, word: str) -> None:
        """Take what another rank tells (`Told`): a note, or the counts that it has done by now."""
        kind, _, rest = word.partition(" ")
        if kind == "note":
            self.note(f"rank {rank}: {printable(rest)}")
        elif kind == "done":
            with suppress(ValueError), self._lock:
                count, effort = map(int, rest.split())
                before = self._heard.get(rank, (0, 0.0))
                self._heard[rank] = count, float(effort)
                if self._counting:
                    self._catch_up({rank: before})

    def _catch_up(self, before: Mapping[int, tuple[int, float]]) -> None:
        for rank, (count, effort) in before.items():
            now, effort_now = self._heard[rank]
            self._shown.advance(now - count, effort=effort_now - effort)


class Told:
    """A receiver on the other ranks, which tells rank 0."""

    def __init__(self, world: World):
        self._world = world
        self._count, self._effort = 0, 0.0
        self._counting = False
        self._last = 0.0

    def start(self, task: Task, /) -> None:
        self._counting = task.name == "convert"

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        if not self._counting:
            return
        self._count += count
        self._effort += count if effort is None else effort
        if time.monotonic() - self._last >= _TELL_SECONDS:
            self._last = time.monotonic()
            self.flush()

    def flush(self) -> None:
        self._world.tell_leader(f"done {self._count} {round(self._effort)}")

    def note(self, text: str, /) -> None:
        if self._counting:
            self.flush()
        self._world.tell_leader(f"note {text}")
