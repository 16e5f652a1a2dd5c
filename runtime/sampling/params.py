"""Sampling parameters of a request."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Final, TypedDict

from ...errors import GenerationError
from ...inputs.printable import shown

MOST_LOGPROBS: Final = 1024
"""Most log-probabilities of a token that a request may ask for."""


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request. The default is greedy: one prompt, one text (docs/generation.md).

    temperature 0 is greedy; top_k, top_p, min_p and seed then change nothing. top_k 0, top_p 1, min_p 0,
    repetition_penalty 1 and other penalties of 0 are off. First come the repetition penalty (for tokens of prompt and
    completion), presence and frequency penalty (-2 to 2, for tokens of the completion) and logit_bias (-100 to 100 by
    token id). Then filters apply in the order temperature, top-k, top-p, min-p, each to the tokens that the one before
    left, as in transformers.
    stop: a text or several; the completion ends before the first of them. The text of a special token means that token.
    stop_token_ids: tokens that end the completion. ignore_eos: continue after the end-of-sequence token.
    min_tokens: so many tokens at least come before an end, stop strings included.
    seed: of this sequence's random numbers, which do not depend on other sequences; None draws a fresh seed.
    n: completions of each prompt, with random numbers of their own.
    logprobs: report each token's log-probability and this number of likeliest ones; None: none. prompt_logprobs: the
    same for the prompt's tokens, all but the first. Blocks of other prompts are not reused for it.
    Raises GenerationError for a value of a wrong type or out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._set("max_new_tokens", int, lambda n: n >= 1, "a whole number from 1")
        self._set("temperature", float, lambda t: 0 <= t < math.inf, "a number from 0")
        self._set("top_k", int, lambda k: k >= 0, "a whole number from 0 (off)")
        self._set("top_p", float, lambda p: 0 < p <= 1, "a number above 0 and at most 1")
        self._set("min_p", float, lambda p: 0 <= p <= 1, "a number from 0 to 1")
        self._set("repetition_penalty", float, lambda r: 0 < r < math.inf, "a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._set(name, float, lambda p: -2 <= p <= 2, "a number from -2 to 2")
        self._set("min_tokens", int, lambda n: n >= 0, "a whole number from 0")
        if self.min_tokens > self.max_new_tokens:
            raise GenerationError(f"min_tokens {self.min_tokens} is above max_new_tokens {self.max_new_tokens}")
        if self.seed is not None:
            self._set("seed", int, lambda s: -(2**63) <= s < 2**63, "None or a whole number of 64 bits, with its sign")
        self._set("n", int, lambda n: n >= 1, "a whole number from 1")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._set(name, int, lambda n: 0 <= n <= MOST_LOGPROBS, f"None or 0 to {MOST_LOGPROBS}")
        if not isinstance(self.ignore_eos, bool):
            raise GenerationError(f"ignore_eos {shown(self.ignore_eos)} is not valid: it must be True or False")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_token_ids", _token_ids(self.stop_token_ids))
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))

    def _set(self, name: str, kind: type[int] | type[float], holds: Callable[[Any], bool], expected: str) -> None:
        """Check a field and convert it to a plain number of Python."""
        value: Any = getattr(self, name)
        plain = _plain(value, kind)
        if plain is not None and holds(plain):
            object.__setattr__(self, name, plain)
            return
        raise GenerationError(f"{name} {shown(value)} is not valid: it must be {expected}")

    @classmethod
    def of(cls, base: SamplingParams, options: Mapping[str, Any]) -> SamplingParams:
        """Replace fields of `base` by name. Raises GenerationError for an unknown name and for a bad value."""
        if not isinstance(base, cls):
            raise GenerationError(f"params must be SamplingParams, not a {type(base).__name__}")
        unknown = [name for name in options if name not in cls.__dataclass_fields__]
        if unknown:
            known = ", ".join(cls.__dataclass_fields__)
            raise GenerationError(f"unknown option {', '.join(unknown)}; npuq knows {known}")
        return replace(base, **options)


class SamplingOptions(TypedDict, total=False):
    """The fields of SamplingParams as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    min_tokens: int
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    seed: int | None
    ignore_eos: bool
    n: int
    logprobs: int | None
    prompt_logprobs: int | None


def _plain(value: Any, kind: type[int] | type[float]) -> Any:
    """A number of any library as Python's; None for anything else."""
    if not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real):
        with suppress(OverflowError):
            return int(value) if kind is int else float(value)  # type: ignore[call-overload]
    return None


def _stops(given: Any) -> tuple[str, ...]:
    given = () if given is None else given
    stops = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(text, str) for text in stops):
        raise GenerationError(f"stop {shown(given)} is not valid: it must be a text or a list of texts")
    if "" in stops:
        raise GenerationError("a stop string is empty: it would end every text before it begins")
    return stops


def _token_ids(given: Any) -> tuple[int, ...]:
    listed = given if isinstance(given, (list, tuple, set, frozenset)) else () if given is None else (None,)
    ids = tuple(_plain(token, int) for token in listed)
    if any(token is None or token < 0 for token in ids):
        raise GenerationError(f"stop_token_ids {shown(given)} is not valid: it must be a list of token ids")
    return ids


def _biases(given: Any) -> Mapping[int, float]:
    entries = {} if given is None else given
    if not isinstance(entries, Mapping):
        raise GenerationError(f"logit_bias {shown(given)} is not valid: it must map token ids to numbers")
    biases = {_plain(token, int): _plain(bias, float) for token, bias in entries.items()}
    if any(token is None or token < 0 or bias is None or not -100 <= bias <= 100 for token, bias in biases.items()):
        raise GenerationError(
            f"logit_bias {shown(given)} is not valid: it must map token ids to numbers from -100 to 100"
        )
    return biases
