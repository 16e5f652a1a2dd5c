"""A request on its way: its tokens, its blocks, and how far it has come."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from .sampler import Sampler, SamplingParams


@dataclass(eq=False)
class Sequence:
    """One prompt and what follows it.

    tokens: prompt and generated tokens. num_cached: how many of them have their latents in `blocks`.
    max_tokens: where generation stops for lack of room or because enough was asked for. stop_ids: tokens that end it.
    """

    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    sampler: Sampler
    stop_ids: frozenset[int]
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @classmethod
    def start(
        cls, prompt: abc.Sequence[int], params: SamplingParams, context: int, stop_ids: frozenset[int]
    ) -> Sequence:
        """A fresh sequence; `context` bounds prompt and completion together."""
        max_tokens = min(context, len(prompt) + params.max_new_tokens)
        return cls(list(prompt), len(prompt), params, max_tokens, Sampler(params), stop_ids)

    @property
    def num_completion_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens yet to run through the model before the next one can be sampled."""
        return len(self.tokens) - self.num_cached

    @property
    def is_decoding(self) -> bool:
        """Whether only the newest token is pending and something was generated already."""
        return self.num_pending == 1 and self.num_completion_tokens > 0
