"""Tokens of a step divided among the ranks of a group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Slices:
    """Consecutive tokens for each rank, as evenly as they divide: the first ranks have one more.

    With at least as many tokens as ranks, no slice is empty.
    """

    tokens: int
    ranks: int

    @property
    def longest(self) -> int:
        return -(-self.tokens // self.ranks)

    @property
    def counts(self) -> list[int]:
        """Tokens of each rank."""
        each, more = divmod(self.tokens, self.ranks)
        return [each + (rank < more) for rank in range(self.ranks)]

    def of(self, rank: int) -> slice:
        first = sum(self.counts[:rank])
        return slice(first, first + self.counts[rank])
