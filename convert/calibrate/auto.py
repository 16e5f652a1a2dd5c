"""Smoothing of each layer by trial: with or without, by the smaller error at the layer's output.

Trials quantize the layer on some of the samples and write nothing. Rotation concerns the whole model and is not tried
here. Nor is plain rounding: GPTQ with its refinement is never worse on the calibration samples, row for row.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from .context import Walk
from .layer_report import Trials
from .states import StreamPair

# The share of the samples that trials take, and the least number of them where there are so many.
_SHARE, _LEAST = 0.25, 16


@dataclass
class TimeBudget:
    """Seconds for a whole walk; trials may use the time beyond that of the layers. None: no limit."""

    seconds: float | None = None
    _began: float = field(default_factory=time.monotonic)
    _layer: float = 0.0
    _trial: float = 0.0

    def allows_trials(self, layers_left: int) -> bool:
        """True where another trial fits beside the remaining layers, each taking as long as the longest so far."""
        if self.seconds is None:
            return True
        spent = time.monotonic() - self._began
        return spent + self._trial + layers_left * self._layer <= self.seconds

    def trial_took(self, seconds: float) -> None:
        self._trial = max(self._trial, seconds)

    def layer_took(self, seconds: float) -> None:
        self._layer = max(self._layer, seconds)


def run_trials(
    walk: Walk,
    streams: StreamPair,
    middle: StreamPair,
    out: StreamPair,
    run: Callable[[Walk, StreamPair, StreamPair, StreamPair], float],
) -> Trials:
    """Quantize a layer on the first samples with smoothing and without; return the error at its output of each.

    run: quantizes the layer from its input streams, through those between attention and experts, to those after it. It
    overwrites the first samples of `middle` and `out`.
    """
    samples = min(walk.samples, max(_LEAST, round(walk.samples * _SHARE)))
    parts = [pair.first(samples * walk.sequence_length) for pair in (streams, middle, out)]
    nowhere = walk.linears.trial()
    trial = replace(walk, linears=nowhere, expert_linears=nowhere, samples=samples, done=lambda job: None)
    smooth, plain = (run(replace(trial, smooth=smooth), *parts) for smooth in (True, False))
    return Trials(smooth, plain)
