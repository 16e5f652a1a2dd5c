"""Gumbel noise as a function of seed, position and token: a draw depends on nothing else.

The token with the highest log p + Gumbel noise has the distribution p (the Gumbel-max trick). Its noise comes from the
counter-based generator Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011). The key is
seed and choice; the counter's highest word is the position, its lowest word the token id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_WORDS: Final = 4
"""Numbers of one counter value."""

_FEW: Final = 32
"""Up to so many tokens, a generator for each costs less than the numbers of the whole vocabulary."""


@dataclass(frozen=True)
class Noise:
    """The noise of one sequence. seed: any integer, taken modulo 2^64. choice: number of the sequence's choice."""

    seed: int
    choice: int = 0

    def gumbel(self, position: int, ids: NDArray[np.int64]) -> NDArray[np.float64]:
        """Noise of tokens `ids` at a position: float64 `[ids]`."""
        if len(ids) <= _FEW:
            numbers = [self._generator(position, id // _WORDS).random_raw(_WORDS)[id % _WORDS] for id in ids.tolist()]
            return gumbel(np.array(numbers, np.uint64))
        return gumbel(self.numbers(position, int(ids.max()) + 1)[ids])

    def numbers(self, position: int, count: int) -> NDArray[np.uint64]:
        """Random numbers of the first `count` tokens at a position. `gumbel` turns them into noise, in their order."""
        return np.asarray(self._generator(position, 0).random_raw(count))

    def _generator(self, position: int, block: int) -> np.random.Philox:
        key = np.array([self.seed % 2**64, self.choice], np.uint64)
        return np.random.Philox(key=key, counter=np.array([block, 0, 0, position], np.uint64))


def gumbel(numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Gumbel noise of random numbers: -log(-log u), where u are their upper 52 bits, moved to the middle of a step."""
    return -np.log(-np.log(((numbers >> np.uint64(12)) + 0.5) * 2.0**-52))


def least_number(noise: float) -> int:
    """The least random number whose noise may exceed `noise`; a step of u lower, for the rounding of logarithms."""
    with np.errstate(over="ignore"):
        u = float(np.exp(-np.exp(-noise)))
    return max(0, min(int(u * 2.0**52) - 2, 2**52 - 2)) << 12
