"""Sampling: the choice of the next token from a row of logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..errors import GenerationError
from ..inputs.printable import shown


@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of a request. The default is greedy: one prompt, one text (docs/generation.md).

    temperature 0 is greedy; top_k, top_p, min_p and seed then change nothing. top_k 0, top_p 1, min_p 0 and
    repetition_penalty 1 are off. Filters apply in the order repetition penalty, temperature, top-k, top-p, min-p, each
    to the tokens that the one before left, as in transformers.
    seed: of this sequence's random numbers, which do not depend on other sequences; None draws a fresh seed.
    stop: a text or several; the completion ends before the first of them. The text of a special token means that token.
    ignore_eos: continue after the end-of-sequence token.
    Raises GenerationError for a value of a wrong type or out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        self._set("max_new_tokens", int, lambda n: n >= 1, "a whole number from 1")
        self._set("temperature", float, lambda t: 0 <= t < math.inf, "a number from 0")
        self._set("top_k", int, lambda k: k >= 0, "a whole number from 0 (off)")
        self._set("top_p", float, lambda p: 0 < p <= 1, "a number above 0 and at most 1")
        self._set("min_p", float, lambda p: 0 <= p <= 1, "a number from 0 to 1")
        self._set("repetition_penalty", float, lambda r: 0 < r < math.inf, "a number above 0")
        if self.seed is not None:
            self._set("seed", int, lambda s: 0 <= s < 2**63, "None or a whole number from 0 to 2^63 - 1")
        if not isinstance(self.ignore_eos, bool):
            raise GenerationError(f"ignore_eos {shown(self.ignore_eos)} is not valid: it must be True or False")
        given: Any = () if self.stop is None else self.stop
        stop = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
        if not all(isinstance(text, str) for text in stop):
            raise GenerationError(f"stop {shown(given)} is not valid: it must be a text or a list of texts")
        if "" in stop:
            raise GenerationError("a stop string is empty: it would end every text before it begins")
        object.__setattr__(self, "stop", stop)

    def _set(self, name: str, kind: type[int] | type[float], holds: Callable[[Any], bool], expected: str) -> None:
        """Check a field and convert it to a plain number of Python."""
        value: Any = getattr(self, name)
        if not isinstance(value, bool) and isinstance(value, Integral if kind is int else Real):
            with suppress(OverflowError):
                plain = kind(value)  # type: ignore[call-overload]
                if holds(plain):
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
    stop: str | Sequence[str] | None
    seed: int | None
    ignore_eos: bool


def not_finite() -> GenerationError:
    """The error for logits that are not finite."""
    return GenerationError("the model's logits are not finite: the weights are damaged, or their scales are")


class Sampler:
    """Sampler of one sequence, with a random generator of its own: other sequences do not change its draws."""

    def __init__(self, params: SamplingParams):
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._seen = _Seen()

    def next_token(self, logits: Tensor, context: Sequence[int]) -> int:
        """Choose the next token from float32 logits `[vocab]` on the host.

        context: tokens of the prompt and generated ones; each call's context begins with the last call's. Raises
        GenerationError for logits that are not finite.
        """
        params = self._params
        best = int(logits.argmax())
        if not math.isfinite(logits[best].item()):
            raise not_finite()
        if params.repetition_penalty != 1:
            logits = _penalise(logits, self._seen.ids(context), params.repetition_penalty)
            best = int(logits.argmax())
        if params.temperature == 0:
            return best
        tokens, probabilities = _candidates(logits, params)
        cumulative = probabilities.cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        chosen = min(int(torch.searchsorted(cumulative, point, right=True)), len(tokens) - 1)
        return int(tokens[chosen])


class _Seen:
    """Set of the tokens of a growing context."""

    def __init__(self) -> None:
        self._counted = 0
        self._known: set[int] = set()
        self._ids = torch.empty(0, dtype=torch.int64)

    def ids(self, context: Sequence[int]) -> Tensor:
        """Distinct tokens of a context that begins with the last call's: int64 `[tokens]`."""
        fresh = set(context[self._counted :]) - self._known
        self._counted = len(context)
        if fresh:
            self._known |= fresh
            self._ids = torch.cat([self._ids, torch.tensor(sorted(fresh))])
        return self._ids


def _penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalise repetition as in CTRL (arXiv:1909.05858): positive logits of seen tokens are divided, others multiplied.

    logits: float32 `[vocab]`; seen: int64 `[tokens]`, each once.
    """
    # In float64, since an extreme penalty leaves float32.
    values = logits[seen].double()
    changed = torch.where(values > 0, values / penalty, values * penalty)
    limits = torch.finfo(logits.dtype)
    return logits.index_copy(0, seen, changed.clamp(limits.min, limits.max).to(logits.dtype))


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """Tokens left by temperature and filters, best first, and their float64 probabilities (not normalised).

    The temperature divides differences from the best logit: a tiny one gives probabilities of 1 and 0, and no NaN.
    """
    size = logits.shape[0]
    if params.top_k and params.top_k < size:
        values, tokens = logits.topk(params.top_k)
    else:
        values, tokens = logits.sort(descending=True)
    probabilities = ((values.double() - values[0].double()) / params.temperature).softmax(0)
    if params.top_p < 1:
        # The smallest set whose probability reaches top_p: drop a token if the ones before it reach it.
        before = probabilities.cumsum(0) - probabilities
        kept = before < params.top_p
        tokens, probabilities = tokens[kept], probabilities[kept]
    if params.min_p > 0:
        kept = probabilities >= params.min_p * probabilities[0]
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities
