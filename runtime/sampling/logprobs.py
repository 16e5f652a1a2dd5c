"""Log-probabilities of tokens: of the model itself, before temperature, penalties, masks and filters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .rows import LogitRow


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probability of a token, and the likeliest tokens in its place with theirs, likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(row: LogitRow, token: int, count: int) -> TokenLogprobs:
    """The log-softmax of a row at a token, and its `count` highest values."""
    values, ids = row.best(max(count, 1))
    log_sum = float(values[0]) + math.log(row.total(1.0))
    top = zip(ids[:count].tolist(), (values[:count].astype(np.float64) - log_sum).tolist(), strict=True)
    return TokenLogprobs(token, float(row.at(np.array([token]))[0]) - log_sum, tuple(top))
