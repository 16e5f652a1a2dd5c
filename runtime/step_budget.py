"""How many prefill tokens a step takes beside its decodes: bounded in tokens, and in seconds where somebody waits."""

from __future__ import annotations

from typing import Final

_FEWEST: Final = 16
"""Prefill tokens of a step at least: prompts go on, however slow the machine is."""

_NEWEST: Final = 0.25
"""Weight of the newest measurement in an exponential mean."""


class StepBudget:
    """The budget of an engine's steps. tokens: of prefill and decodes together. seconds: of a step; None: no bound.

    Where seconds bound the step, two exponential means say how many tokens those are: the seconds of a prefill token,
    and those of a step that only decodes. Before the first measurement a step takes one block of prefill.
    """

    def __init__(self, tokens: int, seconds: float | None = None, block_size: int = 128):
        self._tokens = tokens
        self._seconds = seconds
        self._block_size = block_size
        self._prefill_token: float | None = None
        self._decodes: float | None = None

    def prefill_tokens(self, decodes: int) -> int:
        """Prefill tokens of a step with that many decodes; whole blocks, if it is more than one."""
        left = self._tokens - decodes
        if self._seconds is None:
            return left
        if self._prefill_token is None:
            return min(self._block_size, left)
        room = self._seconds - ((self._decodes or 0.0) if decodes else 0.0)
        # Compared before it is divided: a room of seconds by a cost of nearly nothing is no integer.
        count = left if room >= left * self._prefill_token else max(_FEWEST, int(max(room, 0.0) / self._prefill_token))
        if count > self._block_size:
            count -= count % self._block_size
        return min(count, left)

    @property
    def prefill_token_seconds(self) -> float | None:
        """Seconds of a prefill token; None before the first measurement."""
        return self._prefill_token

    def measured(self, prefill: int, decodes: int, seconds: float) -> None:
        """Learn from a step that took so many tokens and seconds."""
        if not prefill:
            self._decodes = _mean(self._decodes, seconds)
        else:
            own = max(seconds - ((self._decodes or 0.0) if decodes else 0.0), 0.0)
            self._prefill_token = _mean(self._prefill_token, own / prefill)


def _mean(before: float | None, newest: float) -> float:
    return newest if before is None else before + _NEWEST * (newest - before)
