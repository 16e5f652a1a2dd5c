"""Times of the operators of a forward pass, each called again and again where the pass calls it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ...ops import Ops
from .traffic import operator_bytes

PARTS = ("norms", "products", "routing", "rotary", "mla", "sparse", "gqa")
NOT_OF_A_STEP = {"load", "moe_of"}
LEAST_SECONDS = 2e-3
"""A measurement repeats a call for so long, which hides what waiting for the device costs."""
MOST_REPEATS = 50
MEASURED_CALLS = 3
"""Calls of one operator with one set of shapes that are measured; others only count."""
OWN_SHARE = 0.1
"""An operator made of others is listed if it takes so much of its time itself."""


@dataclass
class OperatorTime:
    """All calls of one operator with one set of shapes in a step.

    shapes: of its first argument, its weights' kind and its result. seconds: of one call, without those of the
    operators that it calls. bytes: that a call moves at least.
    """

    operator: str
    shapes: str
    calls: int
    seconds: float
    bytes: int

    @property
    def step_seconds(self) -> float:
        return self.calls * self.seconds


@dataclass
class _Measured:
    own: list[float]
    inclusive: list[float]
    moved: int
    calls: int = 0


class OperatorTimer:
    """Wraps a backend's operators and measures them while a forward pass runs.

    An operator is called once for the pass, then again until the clock can tell; all operators give the same result
    again, or write the same into the cache. Calls within a call are measured apart and subtracted.
    """

    def __init__(self, ops: Ops):
        self._ops = ops
        self._measured: dict[tuple[str, str], _Measured] = {}
        self._within: list[float] = []  # seconds of the inner calls of each call that is being made
        self._repeating = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Measure what runs inside."""
        wrapped: list[tuple[Any, str]] = []
        try:
            for part in PARTS:
                operators = getattr(self._ops, part, None)
                for name in [] if operators is None else _operator_names(operators):
                    setattr(operators, name, self._timed(name, getattr(operators, name)))
                    wrapped.append((operators, name))
            yield
        finally:
            for operators, name in wrapped:
                delattr(operators, name)

    def times(self) -> list[OperatorTime]:
        """Measurements, the most expensive first."""
        found = [
            OperatorTime(name, shapes, each.calls, median(each.own), each.moved)
            for (name, shapes), each in self._measured.items()
            if median(each.own) >= OWN_SHARE * median(each.inclusive)
        ]
        return sorted(found, key=lambda each: -each.step_seconds)

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._repeating:
                return function(*args, **kwargs)
            self._within.append(0.0)
            result = function(*args, **kwargs)
            inner = self._within.pop()
            arguments = [*args, *kwargs.values()]
            key = (name, _shapes(arguments, result))
            measured = self._measured.get(key)
            if measured is None:
                measured = self._measured[key] = _Measured([], [], operator_bytes(name, arguments, result))
            measured.calls += 1
            if len(measured.inclusive) < MEASURED_CALLS:
                inclusive = self._repeat(lambda: function(*args, **kwargs))
                measured.inclusive.append(inclusive)
                measured.own.append(max(0.0, inclusive - inner))
            if self._within:
                self._within[-1] += median(measured.inclusive)
            return result

        return call

    def _repeat(self, run: Callable[[], object]) -> float:
        self._repeating = True
        try:
            return seconds_of(run, self._ops.device, LEAST_SECONDS, MOST_REPEATS)
        finally:
            self._repeating = False


def seconds_of(run: Callable[[], object], device: torch.device, least: float, most: int) -> float:
    """Seconds of a call, the mean of several back to back: of as many as take `least` seconds, at most `most`."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    once = time.perf_counter() - started
    repeats = max(1, min(most, round(least / max(once, 1e-9))))
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def synchronize(device: torch.device) -> None:
    """Wait for all that runs on the device."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def _operator_names(part: object) -> list[str]:
    names = {name for kind in type(part).__mro__ for name in vars(kind) if not name.startswith("_")}
    own = {name for name in names if callable(getattr(type(part), name))}
    return sorted(own - NOT_OF_A_STEP - set(vars(part)))


def _shapes(args: list[Any], result: Any) -> str:
    """For instance "8×7168 W8A8Linear → 8×2112"."""
    kinds = [type(arg).__name__ for arg in args if type(arg).__name__.endswith(("Linear", "Experts", "Router"))]
    first, last = (next((_shape(each) for each in _flat(values)), "") for values in (args, [result]))
    return " ".join(filter(None, [first, *kinds, f"→ {last}" if last else ""]))


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape))


def _flat(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _flat(value)
