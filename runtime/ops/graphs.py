"""Capture of the operators of a step into one graph, which the device then runs without the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor


class StepGraph(Protocol):
    """The captured operators of one step, for as many tokens as it had.

    output: what the captured function returned. Every replay overwrites it, and so does a replay of any other graph of
    the same `Graphs`: they share the memory of their results.
    """

    output: Tensor

    def replay(self, kv_lens: Sequence[int]) -> None:
        """Start the operators on the present content of the captured inputs, without waiting for their end.

        kv_lens: `Decode.kv_lens` of the step, which attention takes from the host.
        """


class Graphs(Protocol):
    """Capture on one device."""

    def capture(self, run: Callable[[], Tensor]) -> StepGraph:
        """Capture what `run` launches. It may not read a tensor, nor keep one but its result.

        Its operators do not run until a replay. Every tensor that it reads must live as long as the graph.
        """
