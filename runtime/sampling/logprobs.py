"""Log-probabilities of tokens: of the model itself, before temperature, penalties, masks and filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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


def rows_logprobs(logits: Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprobs]:
    """The log-softmax of rows of logits `[S, vocab]` at a token each, in float32, and the `count` highest of each row.

    Computed where the logits are: as `evaluate` does on the CPU, to the bit.
    """
    scores = logits.to(torch.float32).log_softmax(-1)
    own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None])[:, 0].tolist()
    values, ids = scores.topk(min(count, scores.shape[1]))
    tops = [tuple(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [TokenLogprobs(*entry) for entry in zip(tokens, own, tops, strict=True)]
