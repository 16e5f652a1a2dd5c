"""The choice of the next token of a sequence."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ...errors import GenerationError
from .adjustments import Adjustments
from .filters import candidates, narrows, scores
from .grammar import Grammar
from .logprobs import TokenLogprobs, token_logprobs
from .noise import Noise, gumbel, least_number
from .params import SamplingParams
from .rows import HostRow, LogitRow

_LIKELIEST: Final = 128
"""Without a filter, the winner among so many of the best tokens bounds the noise that any other needs to win."""


@dataclass(frozen=True)
class Sampled:
    """A chosen token, with log-probabilities if the request asks for them."""

    token: int
    logprobs: TokenLogprobs | None = None


class Sampler:
    """Sampler of one sequence. What it draws depends on seed, choice, position and logits alone.

    prompt_tokens: length of the prompt. ends: tokens that end the sequence. choice: number of this sequence among those
    of its prompt. grammar: of its text, in its first state.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_tokens: int = 0,
        ends: Iterable[int] = (),
        choice: int = 0,
        grammar: Grammar | None = None,
    ):
        self._params = params
        self._noise = Noise(secrets.randbits(64) if params.seed is None else params.seed, choice)
        self._adjustments = Adjustments(params, prompt_tokens, ends, grammar)
        self._grammar = grammar

    def next_token(self, row: LogitRow, context: Sequence[int]) -> Sampled:
        """Choose the token after `context`, the tokens of prompt and completion so far, from the logits behind it.

        Each call's context begins with the last call's. Raises GenerationError for logits that are not finite, and
        where no token is allowed.
        """
        token = self._choose(row, context)
        if self._grammar is not None:
            self._grammar.accept(token)
        count = self._params.logprobs
        return Sampled(token, None if count is None else token_logprobs(row, token, count))

    def _choose(self, row: LogitRow, context: Sequence[int]) -> int:
        values, ids = row.best(1)
        if not math.isfinite(values[0]):
            raise NotFiniteError
        if self._adjustments.adjusts(context):
            row = HostRow(self._adjustments.apply(row.whole(), context))
            values, ids = row.best(1)
            if np.isneginf(values[0]):
                raise GenerationError("no token is allowed next: grammar, min_tokens and the text so far exclude all")
        if self._params.temperature == 0:
            return int(ids[0])
        if narrows(self._params):
            left, ids = candidates(row, self._params)
            if len(ids) == 1:
                return int(ids[0])
            return int(ids[np.argmax(left + self._noise.gumbel(len(context), ids))])
        return self._draw_from_all(row, len(context))

    def _draw_from_all(self, row: LogitRow, position: int) -> int:
        """The token with the highest score + noise, with the noise computed for those alone that can be it."""
        temperature = self._params.temperature
        numbers = self._noise.numbers(position, row.size)
        values, ids = row.best(_LIKELIEST)
        highest = values[0]
        noisy = scores(values, highest, temperature) + gumbel(numbers[ids])
        # Another token's score is at most that of the last of these.
        needed = float(noisy.max()) - float(scores(values[-1:], highest, temperature)[0])
        others = np.flatnonzero(numbers >= np.uint64(least_number(needed)))
        ids = np.concatenate([ids, others])
        noisy = np.concatenate([noisy, scores(row.at(others), highest, temperature) + gumbel(numbers[others])])
        return int(ids[np.argmax(noisy)])


class NotFiniteError(GenerationError):
    """The error for logits that are not finite."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite: the weights are damaged, or their scales are")
