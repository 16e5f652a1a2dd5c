"""The choice of the next token of a sequence."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...errors import GenerationError
from .adjustments import Adjustments
from .grammar import Grammar
from .logprobs import TokenLogprobs, token_logprobs
from .noise import Noise
from .params import SamplingParams
from .rows import LogitRow


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
            row = row.with_logits(self._adjustments.apply(row.whole(), context))
            values, ids = row.best(1)
            if np.isneginf(values[0]):
                raise GenerationError("no token is allowed next: grammar, min_tokens and the text so far exclude all")
        if self._params.temperature == 0:
            return int(ids[0])
        return row.draw(self._params, self._noise, len(context))


class NotFiniteError(GenerationError):
    """The error for logits that are not finite."""

    def __init__(self) -> None:
        super().__init__("the model's logits are not finite: the weights are damaged, or their scales are")
