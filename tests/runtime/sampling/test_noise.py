"""Random numbers: Philox as published, one for each seed, choice, position and token."""

from __future__ import annotations

import numpy as np
import pytest

from npuq.runtime.sampling.noise import Noise, gumbel, least_number

MASK = 2**64 - 1


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x64-10, after the paper."""
    (a, b, c, d), (low, high) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = second >> 64 ^ b ^ low, second & MASK, first >> 64 ^ d ^ high, first & MASK
        low, high = low + 0x9E3779B97F4A7C15 & MASK, high + 0xBB67AE8584CAA73B & MASK
    return [a, b, c, d]


def test_known_answers() -> None:
    """Those that come with Random123, the authors' own code."""
    assert philox((0, 0, 0, 0), (0, 0)) == [
        0x16554D9ECA36314C,
        0xDB20FE9D672D0FDC,
        0xD7E772CEE186176B,
        0x7E68B68AEC7BA23B,
    ]
    assert philox((MASK,) * 4, (MASK, MASK)) == [
        0x87B092C3013FE90B,
        0x438C3C67BE8D0224,
        0x9CC7D7C69CD777B6,
        0xA09CAEBF594F0BA0,
    ]


@pytest.mark.parametrize("seed", [0, 11, -1, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("choice", [0, 3])
@pytest.mark.parametrize("position", [0, 1, 5, 131071])
def test_every_token_has_its_number(seed: int, choice: int, position: int) -> None:
    noise = Noise(seed, choice)
    numbers = noise.numbers(position, 41)
    golden = [number for block in range(11) for number in philox((block + 1, 0, 0, position), (seed & MASK, choice))]
    assert numbers.tolist() == golden[:41]
    for ids in (np.array([7]), np.array([40, 3, 3, 0]), np.arange(41)):  # few and many
        assert np.array_equal(noise.gumbel(position, ids), gumbel(numbers[ids]))


def test_noise_is_gumbels() -> None:
    """Moments of the standard Gumbel distribution, and finite values for the least and the greatest number."""
    values = gumbel(Noise(1).numbers(0, 200_000))
    assert values.mean() == pytest.approx(0.5772, abs=0.01)
    assert values.std() == pytest.approx(np.pi / 6**0.5, abs=0.01)
    ends = gumbel(np.array([0, MASK], np.uint64))
    assert np.isfinite(ends).all()
    assert ends[0] < -3.5
    assert ends[1] > 36


def test_neighbours_share_nothing() -> None:
    """Positions, choices and seeds beside each other have numbers of their own."""
    rows = [Noise(seed, choice).numbers(position, 400) for seed in (1, 2) for choice in (0, 1) for position in (5, 6)]
    assert len(np.unique(np.concatenate(rows))) == 8 * 400


def test_the_least_number_misses_none() -> None:
    numbers = np.sort(Noise(3).numbers(0, 20_000))
    values = gumbel(numbers)
    for needed in (-5.0, -1.0, 0.0, 0.3, 2.0, 7.0, 9.0, 36.0, 40.0, -800.0, 800.0):
        below = numbers < np.uint64(least_number(needed))
        assert not (values[below] >= needed).any()
        assert below.sum() >= (values < needed).sum() - 3
    # The greatest number is never missed by rounding.
    top = gumbel(np.array([MASK], np.uint64))[0]
    assert least_number(float(top)) <= MASK
