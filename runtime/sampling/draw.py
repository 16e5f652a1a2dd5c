"""The draw: of the tokens that the filters leave, the one with the highest score + Gumbel noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from .filters import candidates, narrows, scores
from .noise import Noise, gumbel, least_number
from .params import SamplingParams

if TYPE_CHECKING:
    from .rows import LogitRow

_LIKELIEST: Final = 128
"""Without a filter, the winner among so many of the best tokens bounds the noise that any other needs to win."""


def draw(row: LogitRow, params: SamplingParams, noise: Noise, position: int) -> int:
    """Draw a token at a position. The row's highest logit is finite, and the temperature is above 0."""
    if not narrows(params):
        return _draw_from_all(row, params.temperature, noise, position)
    left, ids = candidates(row, params)
    if len(ids) == 1:
        return int(ids[0])
    return int(ids[np.argmax(left + noise.gumbel(position, ids))])


def _draw_from_all(row: LogitRow, temperature: float, noise: Noise, position: int) -> int:
    """The token with the highest score + noise, with the noise computed for those alone that can be it."""
    numbers = noise.numbers(position, row.size)
    values, ids = row.best(_LIKELIEST)
    highest = values[0]
    noisy = scores(values, highest, temperature) + gumbel(numbers[ids])
    # Another token's score is at most that of the last of these.
    needed = float(noisy.max()) - float(scores(values[-1:], highest, temperature)[0])
    others = np.flatnonzero(numbers >= np.uint64(least_number(needed)))
    ids = np.concatenate([ids, others])
    noisy = np.concatenate([noisy, scores(row.at(others), highest, temperature) + gumbel(numbers[others])])
    return int(ids[np.argmax(noisy)])
