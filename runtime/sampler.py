"""How the next token is chosen from a row of logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import GenerationError


@dataclass(frozen=True)
class SamplingParams:
    """What a request asks for. The default is greedy: the same prompt gives the same text.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. Filters apply in the order
    repetition penalty, temperature, top-k, top-p, min-p, each to what the one before left, as in transformers.
    seed: fixes this sequence's random numbers, whatever else runs beside it; None draws a fresh one.
    stop: the text ends before the first of these strings. ignore_eos: go on past the end-of-sequence token.
    Raises GenerationError for a value out of range.
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
        checks = {
            "max_new_tokens": (self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            "temperature": (self.temperature, 0 <= self.temperature < float("inf"), "a number from 0"),
            "top_k": (self.top_k, self.top_k >= 0, "0 (off) or more"),
            "top_p": (self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (self.min_p, 0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (self.repetition_penalty, 0 < self.repetition_penalty < float("inf"), "above 0"),
            "seed": (self.seed, self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        }
        for name, (value, good, expected) in checks.items():
            if not good:
                raise GenerationError(f"{name} {value} is not valid: it must be {expected}")
        if any(not text for text in self.stop):
            raise GenerationError("a stop string is empty: it would end every text before it begins")


class Sampler:
    """One sequence's sampler: its own random generator, so that its draws do not depend on other sequences."""

    def __init__(self, params: SamplingParams):
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def next_token(self, logits: Tensor, context: Sequence[int]) -> int:
        """The next token from float32 logits `[vocab]` on the host; `context`: the prompt's and the generated tokens.

        Raises GenerationError when the logits hold no number to choose from.
        """
        params = self._params
        if params.repetition_penalty != 1:
            logits = _penalise(logits, context, params.repetition_penalty)
        best = int(logits.argmax())
        if not math.isfinite(logits[best].item()):
            raise GenerationError("the model's logits are not finite: the weights are damaged, or their scales are")
        if params.temperature == 0:
            return best
        tokens, probabilities = _candidates(logits / params.temperature, params)
        cumulative = probabilities.cumsum(0)
        point = torch.rand((), generator=self._generator, dtype=torch.float64) * cumulative[-1]
        chosen = min(int(torch.searchsorted(cumulative, point, right=True)), len(tokens) - 1)
        return int(tokens[chosen])


def _penalise(logits: Tensor, context: Sequence[int], penalty: float) -> Tensor:
    """CTRL's rule (arXiv:1909.05858): logits of seen tokens divided by the penalty when positive, else multiplied."""
    seen = torch.tensor(sorted(set(context)), dtype=torch.int64)
    values = logits[seen]
    return logits.index_copy(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def _candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that the filters leave, best first, and their float64 probabilities (not normalised)."""
    size = logits.shape[0]
    if params.top_k and params.top_k < size:
        values, tokens = logits.topk(params.top_k)
    else:
        values, tokens = logits.sort(descending=True)
    probabilities = values.double().softmax(0)
    if params.top_p < 1:
        # The smallest set whose probability reaches top_p: drop a token when those before it already do.
        before = probabilities.cumsum(0) - probabilities
        kept = before < params.top_p
        tokens, probabilities = tokens[kept], probabilities[kept]
    if params.min_p > 0:
        kept = probabilities >= params.min_p * probabilities[0]
        tokens, probabilities = tokens[kept], probabilities[kept]
    return tokens, probabilities
