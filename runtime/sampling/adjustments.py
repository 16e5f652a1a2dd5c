"""Adjustments of logits before the choice: penalties, biases, and tokens that may not come next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from .grammar import Grammar
from .params import SamplingParams
from .rows import Floats, Ids


class Adjustments:
    """The adjustments of one sequence, in this order: repetition penalty, presence and frequency penalty, biases, then
    tokens that end the sequence before `min_tokens`, and tokens outside the grammar.

    prompt_tokens: length of the prompt. ends: tokens that end the sequence.
    """

    def __init__(self, params: SamplingParams, prompt_tokens: int, ends: Iterable[int], grammar: Grammar | None):
        self._params = params
        self._prompt_tokens = prompt_tokens
        self._ends = np.array(sorted(token for token in ends if token >= 0), np.int64)
        self._grammar = grammar
        self._biased = np.array(list(params.logit_bias), np.int64)
        self._biases = np.array(list(params.logit_bias.values()), np.float64)
        self._counted = 0
        self._seen: set[int] = set()
        self._generated: Counter[int] = Counter()

    def apply(self, logits: Floats, context: Sequence[int]) -> Floats:
        """The adjusted logits of the next token; the given ones, if nothing adjusts them.

        context: the sequence's tokens; each call's context begins with the last call's. Raises GenerationError where
        the grammar does.
        """
        params = self._params
        counts = params.presence_penalty != 0 or params.frequency_penalty != 0
        if params.repetition_penalty != 1 or counts:
            self._count(context)
        adjusted = logits.copy()
        if params.repetition_penalty != 1:
            seen = np.fromiter(self._seen, np.int64, len(self._seen))
            _set(adjusted, seen, _penalised(adjusted[seen].astype(np.float64), params.repetition_penalty))
        if counts:
            generated = np.fromiter(self._generated.keys(), np.int64, len(self._generated))
            times = np.fromiter(self._generated.values(), np.int64, len(self._generated))
            _set(adjusted, generated, adjusted[generated] - params.presence_penalty - params.frequency_penalty * times)
        if len(self._biased):
            _set(adjusted, self._biased, adjusted[self._biased] + self._biases)
        if self._is_early(context):
            adjusted[self._ends[self._ends < len(adjusted)]] = -np.inf
        mask = None if self._grammar is None else self._grammar.mask()
        if mask is not None:
            adjusted[: len(mask)][~mask[: len(adjusted)]] = -np.inf
            adjusted[len(mask) :] = -np.inf
        return adjusted

    def adjusts(self, context: Sequence[int]) -> bool:
        """False if `apply` leaves the logits as they are."""
        params = self._params
        penalties = params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0
        return penalties or len(self._biased) > 0 or self._grammar is not None or self._is_early(context)

    def _is_early(self, context: Sequence[int]) -> bool:
        return len(context) - self._prompt_tokens < self._params.min_tokens

    def _count(self, context: Sequence[int]) -> None:
        self._seen.update(context[self._counted :])
        self._generated.update(context[max(self._counted, self._prompt_tokens) :])
        self._counted = len(context)


def _penalised(values: np.ndarray, penalty: float) -> np.ndarray:
    """Penalise repetition as in CTRL (arXiv:1909.05858): positive logits are divided, others multiplied."""
    with np.errstate(over="ignore"):
        return np.where(values > 0, values / penalty, values * penalty)


def _set(logits: Floats, ids: Ids, values: np.ndarray) -> None:
    """Set logits of tokens to float64 values, within what float32 holds: an extreme penalty leaves it."""
    limits = np.finfo(np.float32)
    logits[ids] = np.where(np.isneginf(logits[ids]), -np.inf, values.clip(limits.min, limits.max))
