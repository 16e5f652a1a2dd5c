"""The kernel that draws tokens, against the draw in numpy and numpy's own Philox, at every level."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from npuq.runtime import SamplingParams
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.native.logits import NativeRow
from npuq.runtime.sampling.noise import Noise
from npuq.runtime.sampling.rows import HostRow

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": 5000},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 3000, "top_p": 0.6},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 60, "top_p": 0.95, "min_p": 0.2},
]


@pytest.fixture(scope="module", params=[*LEVELS, "one thread"])
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(threads=1) if request.param == "one thread" else NativeOps(threads=3, level=request.param)


def row(ops: NativeOps, logits: np.ndarray) -> NativeRow:
    (made,) = ops.logit_rows(torch.from_numpy(logits)[None])
    assert isinstance(made, NativeRow)
    return made


def rows() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(8)
    peaked = generator.standard_normal(9001) * 2
    peaked[generator.integers(0, 9001, 12)] += 11
    masked = generator.standard_normal(3000)
    masked[generator.random(3000) < 0.99] = -np.inf
    return {
        "peaked": peaked,
        "flat": generator.standard_normal(8192) * 0.2,
        "equal": np.full(4100, -2.5),
        "zeros of both signs": np.where(generator.random(2050) < 0.5, 0.0, -0.0),
        "few values": generator.integers(-3, 3, 6000),
        "masked": masked,
        "one": np.array([3.0]),
        "five": np.array([1.0, -np.inf, 2.0, 2.0, -7.0]),
        "wide": generator.standard_normal(1023) * 1e38,
    }


@pytest.mark.parametrize("name", rows())
def test_draws_what_numpy_draws(ops: NativeOps, name: str) -> None:
    logits = rows()[name].astype(np.float32)
    native, host = row(ops, logits), HostRow(logits)
    for number, (filters, temperature) in enumerate(itertools.product(FILTERS, (1.0, 0.3, 40.0))):
        params, noise = SamplingParams(temperature=temperature, **filters), Noise(number - 9, number % 2)
        for position in (0, 7 + number):
            drawn = native.draw(params, noise, position)
            assert drawn == host.draw(params, noise, position), (filters, temperature, position)


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_the_noise_is_numpys(ops: NativeOps, seed: int) -> None:
    """At a temperature beyond all, the token with the greatest random number is drawn."""
    logits = np.random.default_rng(2).standard_normal(5003).astype(np.float32)
    params, native = SamplingParams(temperature=1e308), row(ops, logits)
    for choice, position in itertools.product((0, 3), (0, 5, 131071)):
        numbers = Noise(seed, choice).numbers(position, len(logits))
        assert native.draw(params, Noise(seed, choice), position) == numbers.argmax()


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-38])
def test_a_tiny_temperature_takes_the_best(ops: NativeOps, temperature: float) -> None:
    logits = np.array([-3e38, 3e38, 1.0, -np.inf, 2.9e38], np.float32)
    for filters in FILTERS:
        assert row(ops, logits).draw(SamplingParams(temperature=temperature, **filters), Noise(1), 4) == 1


@pytest.mark.parametrize("temperature", [0.2, 1.0, 30.0])
def test_sums_are_float64s(ops: NativeOps, temperature: float) -> None:
    for logits in rows().values():
        x = logits.astype(np.float32)
        exact = np.exp((x.astype(np.float64) - x.max()) / temperature).sum()
        assert row(ops, x).total(temperature) == pytest.approx(exact, rel=1e-8)


def test_adjusted_logits_are_drawn_by_the_kernel_too(ops: NativeOps) -> None:
    made = row(ops, np.zeros(7, np.float32)).with_logits(np.arange(7, dtype=np.float32))
    assert isinstance(made, NativeRow)
    assert made.draw(SamplingParams(temperature=1e-9), Noise(1), 0) == 6


def test_wrong_arguments_are_refused(ops: NativeOps) -> None:
    params = SamplingParams(temperature=1.0)
    for logits in ([1.0, np.nan], [-np.inf, -np.inf], [np.inf, 0.0]):
        with pytest.raises(ValueError, match="draw_token: the numbers are not finite"):
            row(ops, np.array(logits, np.float32)).draw(params, Noise(1), 0)
        with pytest.raises(ValueError, match="likelihood_sum: the numbers are not finite"):
            row(ops, np.array(logits, np.float32)).total(1.0)
    good = row(ops, np.zeros(4, np.float32))
    wrong: dict[str, tuple[Any, ...]] = {
        "temperature": (0.0, -1.0, np.inf, np.nan),
        "top_k": (-1,),
        "top_p": (0.0, 1.5, np.nan),
        "min_p": (-0.1, 1.1, np.nan),
    }
    for name, values in wrong.items():
        for value in values:
            changed = SamplingParams(temperature=1.0)
            object.__setattr__(changed, name, value)
            with pytest.raises(ValueError, match="draw_token"):
                good.draw(changed, Noise(1), 0)
    with pytest.raises(ValueError, match="likelihood_sum"):
        good.total(0.0)
    with pytest.raises(ValueError, match="64 bits"):
        good.draw(params, Noise(1), -1)
    twisted = NativeRow(torch.zeros(8)[::2], ops.pool)
    with pytest.raises(ValueError, match="draw_token: logits is"):
        twisted.draw(params, Noise(1), 0)


def test_rows_beyond_the_kernel_are_drawn_in_numpy(ops: NativeOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("npuq.runtime.ops.native.logits._MOST_LOGITS", 3)
    monkeypatch.setattr(ops.pool, "call", None)
    assert row(ops, np.arange(4, dtype=np.float32)).draw(SamplingParams(temperature=1e-9), Noise(1), 0) == 3
