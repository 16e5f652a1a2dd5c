"""The exact scale, against a walk over every breakpoint in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npuq.quant.optimal_scale import optimal_scale


def every_state(row: np.ndarray) -> tuple[int, int]:
    """A and B of the best of all states of one integer row, the first (largest scale) among equals."""
    magnitude = np.abs(row.astype(np.int64))
    keys, gains_a, gains_b = [], [], []
    for level in range(1, 9):
        reaching = magnitude[magnitude > 0] if level < 8 else magnitude[row < 0]
        keys.append(reaching / (2 * level - 1))
        gains_a.append(reaching)
        gains_b.append(np.full_like(reaching, 2 * level - 1))
    key = np.concatenate(keys)
    if key.size == 0:
        return 0, 0
    order = np.argsort(-key, kind="stable")
    key, a, b = key[order], np.concatenate(gains_a)[order].cumsum(), np.concatenate(gains_b)[order].cumsum()
    complete = np.append(key[1:] != key[:-1], True)
    a, b = a[complete], b[complete]
    score = a.astype(np.float64) ** 2 / b
    best = int(score.argmax())
    return int(a[best]), int(b[best])


def check(weights: np.ndarray) -> None:
    a, b = optimal_scale(torch.from_numpy(weights.astype(np.int32)))
    expected = [every_state(row) for row in weights]
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == expected


def fixed(values: np.ndarray) -> np.ndarray:
    largest = np.abs(values).max(axis=1, keepdims=True)
    return np.rint(values / np.where(largest > 0, largest, 1) * (2**23 - 1)).astype(np.int32)


@pytest.mark.parametrize("columns", [1, 2, 3, 16, 257, 2048])
@pytest.mark.parametrize("kind", ["normal", "heavy", "sparse", "bf16", "one-sided"])
def test_finds_the_best_of_all_states(kind: str, columns: int) -> None:
    rng = np.random.default_rng(columns)
    rows = 24
    values = {
        "normal": lambda: rng.standard_normal((rows, columns)),
        "heavy": lambda: rng.standard_t(1.5, (rows, columns)),
        "sparse": lambda: rng.standard_normal((rows, columns)) * (rng.random((rows, columns)) < 0.05),
        "bf16": lambda: (
            torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).bfloat16().double().numpy()
        ),
        "one-sided": lambda: -rng.random((rows, columns)),
    }[kind]()
    check(fixed(values))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=1, max_size=12))
def test_small_integers_full_of_ties(row: list[int]) -> None:
    check(np.array([row]))


def test_rows_do_not_influence_each_other() -> None:
    weights = torch.from_numpy(fixed(np.random.default_rng(0).standard_t(3, (37, 400))))
    whole = optimal_scale(weights)
    single = [optimal_scale(weights[i : i + 1]) for i in range(len(weights))]
    assert whole[0].tolist() == [int(a) for a, _ in single]
    assert whole[1].tolist() == [int(b) for _, b in single]


def test_no_rows_and_no_columns() -> None:
    assert optimal_scale(torch.zeros(0, 5, dtype=torch.int32))[0].shape == (0,)
    assert optimal_scale(torch.zeros(2, 0, dtype=torch.int32))[1].tolist() == [0, 0]
