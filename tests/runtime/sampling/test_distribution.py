"""The distribution of draws: a χ² test for every filter and adjustment, and for their combinations.

Probabilities come from float64 numpy. Seeds are fixed, so a test passes or fails for ever; its limit is the χ² that one
of some 30,000 right samplers exceeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from npuq.runtime import SamplingParams
from npuq.runtime.sampling.filters import SHORTLIST
from npuq.runtime.sampling.rows import HostRow
from npuq.runtime.sampling.sampler import Sampler

LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.7, 1.6, -0.2, 0.9, -np.inf, 0.4], np.float32)
PROMPT, GENERATED = [0, 3, 3], [1, 1, 6, 5]
ENDS = (6, 2)
DRAWS = 3000


class Some:
    """A grammar that always allows the same tokens."""

    def __init__(self, tokens: Sequence[int], size: int):
        self.allowed = np.zeros(size, np.bool_)
        self.allowed[list(tokens)] = True

    def mask(self) -> NDArray[np.bool_]:
        return self.allowed

    def accept(self, token: int) -> None:
        assert self.allowed[token]


def probabilities(logits: np.ndarray, params: SamplingParams, allowed: Sequence[int] | None) -> np.ndarray:
    """The distribution that is drawn from, after the documentation."""
    values = logits.astype(np.float64)
    for token in {*PROMPT, *GENERATED}:
        factor = params.repetition_penalty
        values[token] = values[token] / factor if values[token] > 0 else values[token] * factor
    for token, times in Counter(GENERATED).items():
        values[token] -= params.presence_penalty + times * params.frequency_penalty
    for token, bias in params.logit_bias.items():
        values[token] += bias
    if len(GENERATED) < params.min_tokens:
        values[list(ENDS)] = -np.inf
    if allowed is not None:
        values[[token for token in range(len(values)) if token not in allowed]] = -np.inf
    values = np.exp((values - values.max()) / params.temperature)
    order = np.argsort(-values, kind="stable")
    if params.top_k:
        values[order[params.top_k :]] = 0
    values /= values.sum()
    if params.top_p < 1:
        before = np.cumsum(values[order]) - values[order]
        values[order[before >= params.top_p]] = 0
    values[values < params.min_p * values.max()] = 0
    return values / values.sum()


def chi_square_limit(freedom: int, z: float = 4.0) -> float:
    """The quantile of χ² at z standard deviations of a normal (Wilson and Hilferty's approximation)."""
    return float(freedom * (1 - 2 / (9 * freedom) + z * (2 / (9 * freedom)) ** 0.5) ** 3)


def assert_distributed(counts: np.ndarray, expected: np.ndarray) -> None:
    assert not counts[expected == 0].any()
    means = expected[expected > 0] * counts.sum()
    seen = counts[expected > 0]
    # Rare tokens are counted together, until ten of them are expected.
    order = np.argsort(-means)
    means, seen = means[order], seen[order]
    rare = int(np.count_nonzero(means >= 10))
    means, seen = np.append(means[:rare], means[rare:].sum()), np.append(seen[:rare], seen[rare:].sum())
    means, seen = (
        (means, seen)
        if means[-1] >= 10
        else (
            np.append(means[:-2], means[-2:].sum()),
            np.append(seen[:-2], seen[-2:].sum()),
        )
    )
    if len(means) > 1:
        assert ((seen - means) ** 2 / means).sum() <= chi_square_limit(len(means) - 1)


FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 4},
    {"top_k": 100},
    {"top_p": 0.8},
    {"top_p": 0.35},
    {"min_p": 0.2},
    {"top_k": 6, "top_p": 0.7},
    {"top_k": 6, "min_p": 0.3},
    {"top_p": 0.9, "min_p": 0.15},
    {"temperature": 0.8, "top_k": 8, "top_p": 0.9, "min_p": 0.1},
]
ADJUSTMENTS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.0},
    {"frequency_penalty": 0.8},
    {"presence_penalty": -0.5, "frequency_penalty": -0.7},
    {"logit_bias": {4: 2.5, 0: -1.0, 10: 100}},
    {"min_tokens": len(GENERATED) + 1},
    {"min_tokens": len(GENERATED)},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.3,
        "logit_bias": {1: 1},
        "min_tokens": 9,
    },
]


@pytest.mark.parametrize("filters", [FILTERS[0], FILTERS[3], FILTERS[5], FILTERS[7], FILTERS[-1]], ids=str)
@pytest.mark.parametrize("adjustments", ADJUSTMENTS, ids=str)
@pytest.mark.parametrize("allowed", [None, (1, 2, 3, 4, 6, 9)])
def test_adjusted(filters: dict[str, Any], adjustments: dict[str, Any], allowed: Sequence[int] | None) -> None:
    """A draw each of many seeds, at one place of one text."""
    context = [*PROMPT, *GENERATED]
    counts = np.zeros(len(LOGITS))
    options = {"temperature": 1.0, **filters, **adjustments}
    for seed in range(DRAWS // 3):
        params = SamplingParams(seed=seed, **options)
        grammar = None if allowed is None else Some(allowed, len(LOGITS))
        sampler = Sampler(params, len(PROMPT), ENDS, grammar=grammar)
        counts[sampler.next_token(HostRow(LOGITS), context).token] += 1
    assert_distributed(counts, probabilities(LOGITS, params, allowed))


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_filters(options: dict[str, Any]) -> None:
    """A draw each of many positions, with one seed."""
    params = SamplingParams(seed=-5, **{"temperature": 1.0, **options})
    sampler = Sampler(params)
    counts = np.zeros(len(LOGITS))
    for position in range(DRAWS):
        counts[sampler.next_token(HostRow(LOGITS), range(position)).token] += 1
    assert_distributed(counts, probabilities(LOGITS, params, None))


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_p": 0.3}, {"min_p": 0.5}, {"top_k": 1500}], ids=str)
@pytest.mark.parametrize("spread", [0.3, 2.0])
def test_many_tokens(options: dict[str, Any], spread: float) -> None:
    """More tokens than are looked at first: flat distributions need all of them."""
    logits = (np.random.default_rng(4).standard_normal(3 * SHORTLIST) * spread).astype(np.float32)
    params = SamplingParams(seed=9, **{"temperature": 1.0, **options})
    sampler = Sampler(params)
    counts = np.zeros(len(logits))
    row = HostRow(logits)
    for position in range(DRAWS):
        counts[sampler.next_token(row, range(position)).token] += 1
    expected = probabilities(logits, params, None)
    assert not counts[expected == 0].any()
    # Tokens in order of their probability, in groups of the same total.
    order = np.argsort(-expected, kind="stable")
    group = np.minimum((np.cumsum(expected[order]) * 24).astype(int), 23)
    assert_distributed(np.bincount(group, counts[order], 24), np.bincount(group, expected[order], 24))


def test_choices_are_independent() -> None:
    """The pairs that two choices of one prompt draw have the product of their distributions."""
    params = SamplingParams(seed=3, temperature=1.0, top_k=4)
    samplers = [Sampler(params, choice=choice) for choice in range(2)]
    row, size = HostRow(LOGITS), len(LOGITS)
    counts = np.zeros((size, size))
    for position in range(DRAWS):
        first, second = (sampler.next_token(row, range(position)).token for sampler in samplers)
        counts[first, second] += 1
    expected = probabilities(LOGITS, params, None)
    assert_distributed(counts.ravel(), np.outer(expected, expected).ravel())
