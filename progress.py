"""What long work tells of itself while it runs. The command line shows it; a library caller hears nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Task:
    """A piece of long work: `total` of `unit` ("B" for bytes, else what is counted, in the plural).

    done: what an earlier run has done of it. effort: what all of it costs, in any unit in which equal amounts take
    equal times, and `effort_done` of that; None where time goes by what is counted. layers: how many decoder layers it
    goes through (0: it does not go by layers), of which an earlier run has done `layers_done`.
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
    """Receives the progress of tasks, one after the other."""

    def start(self, task: Task, /) -> None:
        """A task begins; the one before has ended."""

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        """So much more of the task is done, at what effort.

        `layer` is the decoder layer it belongs to, None outside of them; `layer_done` says that this was its last part.
        """

    def note(self, text: str, /) -> None:
        """One line for the user: a warning, or what is being done."""


class Silent:
    """Progress that nobody watches."""

    def start(self, task: Task, /) -> None:
        return

    def advance(
        self, count: int, /, *, effort: float | None = None, layer: int | None = None, layer_done: bool = False
    ) -> None:
        return

    def note(self, text: str, /) -> None:
        return


class LayersLeft:
    """Which layers still have parts to come, of those whose parts' layers are given (None: of no layer)."""

    def __init__(self, layers: Iterable[int | None]):
        self._left = Counter([layer for layer in layers if layer is not None])
        self.count = len(self._left)

    @property
    def done(self) -> int:
        """How many have nothing to come."""
        return sum(parts == 0 for parts in self._left.values())

    def part_done(self, layer: int | None) -> bool:
        """Count one part; whether it was its layer's last."""
        if layer is None:
            return False
        self._left[layer] -= 1
        return self._left[layer] == 0
