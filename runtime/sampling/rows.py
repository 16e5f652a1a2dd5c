"""The logits of one token, as the sampler asks for them: the best few, or all.

A backend with its logits on a device can answer `best` and `total` there, and copy a whole row only where it must.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .draw import draw
from .noise import Noise
from .params import SamplingParams

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

_STRIDE: Final = 64
"""Every such logit is looked at to guess where the best end."""


class LogitRow(Protocol):
    """The logits after one token: float32, on the host once they are asked for."""

    @property
    def size(self) -> int:
        """Number of logits, those of all tokens of the vocabulary."""

    def best(self, count: int) -> tuple[Floats, Ids]:
        """The `count` highest logits and their tokens, highest first (all of them when there are fewer).

        The first is NaN if any logit is.
        """

    def at(self, ids: Ids) -> Floats:
        """Logits of tokens."""

    def total(self, temperature: float) -> float:
        """Σ exp((logit - highest) / temperature) over all tokens."""

    def whole(self) -> Floats:
        """All logits, by token. The caller leaves them unchanged."""

    def draw(self, params: SamplingParams, noise: Noise, position: int) -> int:
        """Draw a token at a position, as `draw.draw`. The highest logit is finite, and the temperature is above 0."""

    def with_logits(self, logits: Floats) -> LogitRow:
        """Make a row of adjusted logits."""


class HostRow:
    """A row in the host's memory. Equal logits rank by token id. logits: float32 `[vocab]`."""

    def __init__(self, logits: Floats):
        self._logits = logits

    @property
    def size(self) -> int:
        return len(self._logits)

    def best(self, count: int) -> tuple[Floats, Ids]:
        if count == 1:
            ids = np.array([self._logits.argmax()])
        else:
            among = np.arange(self.size) if 4 * count >= self.size else self._above(count)
            ids = _ordered(self._logits, among)[:count]
        return self._logits[ids], ids

    def _above(self, count: int) -> Ids:
        """Tokens among which the best `count` are: few more, unless logits are equal."""
        sample = np.sort(self._logits[::_STRIDE])
        rank = count * 3 // (2 * _STRIDE) + 8
        if rank <= len(sample):
            ids = np.flatnonzero(self._logits >= sample[-rank])
            if len(ids) >= count:
                return ids
        return np.flatnonzero(self._logits >= np.partition(self._logits, -count)[-count])

    def at(self, ids: Ids) -> Floats:
        return self._logits[ids]

    def total(self, temperature: float) -> float:
        limits = np.finfo(np.float32)
        divisor = np.float32(min(max(temperature, float(limits.tiny)), float(limits.max)))
        with np.errstate(over="ignore"):  # to -inf, whose exponential is 0
            scaled = (self._logits - self._logits.max()) / divisor
        return float(np.exp(scaled).sum(dtype=np.float64))

    def whole(self) -> Floats:
        return self._logits

    def draw(self, params: SamplingParams, noise: Noise, position: int) -> int:
        return draw(self, params, noise, position)

    def with_logits(self, logits: Floats) -> LogitRow:
        return HostRow(logits)


def _ordered(logits: Floats, ids: Ids) -> Ids:
    """Sort tokens by falling logits, and equal ones by id: as one integer each, which numpy sorts fastest."""
    bits = (logits[ids] + np.float32(0)).view(np.uint32)  # no negative zero
    falling = np.where(bits >> 31, bits, ~(bits | np.uint32(1 << 31)))
    keys = falling.astype(np.uint64) << np.uint64(32) | ids.astype(np.uint64)
    keys.sort()
    return (keys & np.uint64(2**32 - 1)).astype(np.int64)


def host_rows(logits: Tensor) -> Sequence[LogitRow]:
    """Rows of logits `[S, vocab]` of any device and dtype, copied to the host."""
    return [HostRow(row) for row in logits.to("cpu", torch.float32).numpy()]
