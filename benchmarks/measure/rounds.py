"""Figures of interleaved rounds: medians, spreads, and processor time beside wall time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

Figures = dict[str, float]


def summary(rounds: Sequence[Figures]) -> dict[str, Any]:
    """The rounds; the median, the least and the greatest of each figure. Ratios are figures of a round: both of
    their sides met the same machine."""
    return {
        "rounds": list(rounds),
        "medians": medians(rounds),
        "spreads": {name: [min(values), max(values)] for name, values in _columns(rounds).items()},
    }


def medians(rounds: Sequence[Figures]) -> Figures:
    return {name: statistics.median(values) for name, values in _columns(rounds).items()}


def with_spread(found: Mapping[str, Any], name: str, digits: int = 2, scale: float = 1.0) -> str:
    """Format a figure of a summary: its median; of several rounds also the least and the greatest, in brackets."""
    low, high = (scale * value for value in found["spreads"][name])
    text = f"{scale * found['medians'][name]:,.{digits}f}"
    return text if len(found["rounds"]) == 1 else f"{text} ({low:,.{digits}f} to {high:,.{digits}f})"


def _columns(rounds: Sequence[Figures]) -> dict[str, list[float]]:
    return {name: [found[name] for found in rounds] for name in rounds[0]}


class Stopwatch:
    """Wall seconds and processor seconds of this process (all its threads) since the start."""

    def __init__(self) -> None:
        self._wall, self._processor = time.perf_counter(), time.process_time()

    @property
    def wall(self) -> float:
        return time.perf_counter() - self._wall

    @property
    def processor(self) -> float:
        return time.process_time() - self._processor
