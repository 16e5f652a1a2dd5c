"""Filters: temperature, top-k, top-p and min-p leave a few tokens of a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
from numpy.typing import NDArray

from .params import SamplingParams

if TYPE_CHECKING:
    from .rows import Floats, Ids, LogitRow

SHORTLIST: Final = 1024
"""So many of the best tokens are looked at first, and eight times as many where those do not suffice."""


def candidates(row: LogitRow, params: SamplingParams) -> tuple[NDArray[np.float64], Ids]:
    """Tokens left by the filters, best first, and their scores: (logit - highest) / temperature.

    At least one filter is on (`narrows`), and the temperature is above 0. Each filter applies to the tokens that the
    one before left, in the order top-k, top-p, min-p.
    """
    count = min(params.top_k or SHORTLIST, row.size)
    values, ids = row.best(count)
    kept = _kept(values, row, params)
    while kept == count < row.size and not params.top_k:
        count = min(8 * count, row.size)
        values, ids = row.best(count)
        kept = _kept(values, row, params)
    return scores(values[:kept], values[0], params.temperature), ids[:kept]


def narrows(params: SamplingParams) -> bool:
    """True if a filter is on."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def scores(values: Floats, highest: np.float32, temperature: float) -> NDArray[np.float64]:
    """Differences from the highest logit by temperature: a tiny temperature gives 0 and -inf, and no NaN."""
    with np.errstate(over="ignore"):
        return (values.astype(np.float64) - float(highest)) / temperature


def _kept(values: Floats, row: LogitRow, params: SamplingParams) -> int:
    """How many of the best tokens stay. The likelihoods of those tokens fall, so each filter leaves a beginning."""
    likelihoods = np.exp(scores(values, values[0], params.temperature))  # of the best token: 1
    kept = len(values)
    if params.top_p < 1:
        total = float(likelihoods.sum()) if params.top_k else row.total(params.temperature)
        # The smallest set whose probability reaches top_p: drop a token if the ones before it reach it.
        before = likelihoods.cumsum() - likelihoods
        kept = int(np.count_nonzero(before < params.top_p * total))
    if params.min_p > 0:
        kept = min(kept, int(np.count_nonzero(likelihoods >= params.min_p)))
    return kept
