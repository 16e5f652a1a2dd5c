"""Progress of long work. The command line shows it; library calls are silent by default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """A task of long work: `total` of `unit` ("B" for bytes, else a plural noun).

    done: the part of `total` that an earlier run did. effort: the cost of the whole task, in any unit proportional to
    time, of which an earlier run did `effort_done`; None where time is proportional to `total`. layers: the number of
    decoder layers (0: the task has none), of which an earlier run did `layers_done`.
    """

    name: str
    total: int
    unit: str = "B"
    done: int = 0
    effort: float | None = None
    effort_done: float = 0.0
    layers: int = 0
    layers_done: int = 0


class Progress(Protocol):
    """A receiver of the progress of tasks, one after the other."""

    def start(self, task: Task, /) -> None:
        """Begin a task; the one before has ended."""

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        """Add `count` units and their `effort` to the task's done part.

        layer: the decoder layer of these units, None outside the layers. layer_done: they were the layer's last.
        """

    def note(self, text: str, /) -> None:
        """Show the user one line: a warning, or the current activity."""


class Silent:
    """A receiver that drops all progress."""

    def start(self, task: Task, /) -> None:
        return

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        return

    def note(self, text: str, /) -> None:
        return


class LayersLeft:
    """A count of each layer's remaining parts. `layers` has the layer of every part (None: outside the layers)."""

    def __init__(self, layers: Iterable[int | None]):
        self._left = Counter([layer for layer in layers if layer is not None])
        self.count = len(self._left)

    @property
    def done(self) -> int:
        """The number of layers without remaining parts."""
        return sum(parts == 0 for parts in self._left.values())

    def part_done(self, layer: int | None) -> bool:
        """Count one part as done; True if it was its layer's last."""
        if layer is None:
            return False
        self._left[layer] -= 1
        return self._left[layer] == 0
