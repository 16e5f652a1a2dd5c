"""The pace of a task: its progress, its rate, and the time left."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ...progress import Task
from ...units import format_bytes, format_duration

# The pace is measured over the later half of the time so far, so that it follows a disk or a neighbour that slows down.
_RECENT = 0.5
# Seconds between two remembered moments.
_STEP_SECONDS = 1.0


class Pace:
    """The counts of a task as they grow. `clock` gives seconds."""

    def __init__(self, task: Task, clock: Callable[[], float] = time.monotonic):
        self.task = task
        self.done = task.done
        self.layer: int | None = None
        self.layers_done = task.layers_done
        self._clock = clock
        self._began = clock()
        self._whole = float(task.total) if task.effort is None else task.effort
        self._effort = float(task.done) if task.effort is None else task.effort_done
        self._past = deque([(self._began, self.done, self._effort)])  # seconds, done, effort

    def advance(self, count: int, effort: float | None, layer: int | None, layer_done: bool) -> None:
        """Count more work, with its effort (None: equal to the count)."""
        self.layers_done += layer_done
        self.done += count
        self._effort += count if effort is None else effort
        self.layer = self.layer if layer is None else layer
        now = self._clock()
        if now - self._past[-1][0] < _STEP_SECONDS:
            return
        self._past.append((now, self.done, self._effort))
        recent = self._began + _RECENT * (now - self._began)
        while len(self._past) > 2 and self._past[1][0] <= recent:
            self._past.popleft()

    @property
    def fraction(self) -> float:
        """The done part of the whole effort, from 0 to 1."""
        return min(1.0, self._effort / self._whole) if self._whole else 1.0

    @property
    def rate(self) -> float | None:
        """Counts a second; None before any measurement."""
        return self._rate(1)

    @property
    def seconds_left(self) -> float | None:
        """Seconds left, by effort; None before any measurement."""
        rate = self._rate(2)
        return None if not rate else max(0.0, self._whole - self._effort) / rate

    def _rate(self, column: int) -> float | None:
        seconds = self._clock() - self._past[0][0]
        grown = (self._past[0][0], self.done, self._effort)[column] - self._past[0][column]
        return grown / seconds if seconds > 0 and grown > 0 else None

    def line(self, *, layer_done: bool) -> str:
        """A line such as `layer 3 done (4 of 62), 33.1 GB of 671 GB (5 %), 812 MB/s, 13 min left`."""
        parts = []
        if self.layer is not None:
            counted = f" done ({self.layers_done} of {self.task.layers})" if layer_done else ""
            parts.append(f"layer {self.layer}{counted}")
        parts.append(f"{self.count_text()} ({100 * self.fraction:.0f} %)")
        if self.rate is not None:
            is_bytes = self.task.unit == "B"
            parts.append(f"{format_bytes(self.rate)}/s" if is_bytes else f"{self.rate:.3g} {self.task.unit}/s")
        if self.seconds_left is not None:
            parts.append(f"{format_duration(self.seconds_left)} left")
        return ", ".join(parts)

    def count_text(self) -> str:
        """The count, such as `33.1 GB of 671 GB`, or `12 of 300 contexts`."""
        if self.task.unit == "B":
            return f"{format_bytes(self.done)} of {format_bytes(self.task.total)}"
        return f"{self.done} of {self.task.total} {self.task.unit}"

    def as_dict(self) -> dict[str, Any]:
        """Values for JSON: `done` and `total` of `unit`, the done part of the work, and times in seconds."""
        return {
            "task": self.task.name,
            "done": self.done,
            "total": self.task.total,
            "unit": self.task.unit,
            "fraction": self.fraction,
            "layer": self.layer,
            "layers": self.task.layers or None,
            "layers_done": self.layers_done,
            "per_second": self.rate,
            "seconds": self._clock() - self._began,
            "seconds_left": self.seconds_left,
        }
