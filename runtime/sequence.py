"""The state of one request: its tokens, its blocks, its progress."""

from __future__ import annotations

from collections import abc
from dataclasses import dataclass, field

from .sampling.grammar import Grammar
from .sampling.logprobs import TokenLogprobs
from .sampling.params import SamplingParams
from .sampling.sampler import Sampler


@dataclass(eq=False)
class Sequence:
    """One prompt and its completion.

    tokens: prompt and generated tokens. num_cached: number of tokens that the cache holds, in `blocks`. max_tokens:
    length at which generation stops, by the context or by max_new_tokens. stop_ids: tokens that end the sequence.
    salt: sequences share blocks only with others of the same salt. leader: the first choice of its prompt, whose blocks
    it waits for. keys: of its blocks (`BlockManager`). num_reused: prompt tokens that the cache held when it entered
    first; None before. prompt_logprobs: of the prompt's tokens from the second on, as far as its steps have come; None
    where nobody asks for them. entered_at: when that was, by `time.perf_counter`.
    """

    tokens: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    sampler: Sampler
    stop_ids: frozenset[int]
    salt: bytes = b""
    leader: Sequence | None = None
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_reused: int | None = None
    entered_at: float | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_cached: int = 0
    finish_reason: str | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @classmethod
    def start(
        cls,
        prompt: abc.Sequence[int],
        params: SamplingParams,
        context: int,
        stop_ids: frozenset[int],
        choice: int = 0,
        grammar: Grammar | None = None,
        salt: bytes = b"",
        leader: Sequence | None = None,
    ) -> Sequence:
        """Start a sequence; `context` limits prompt and completion together. choice: its number among its prompt's."""
        max_tokens = min(context, len(prompt) + params.max_new_tokens)
        sampler = Sampler(params, len(prompt), stop_ids, choice, grammar)
        sequence = cls(list(prompt), len(prompt), params, max_tokens, sampler, stop_ids, salt, leader)
        if params.prompt_logprobs is not None and choice == 0:  # all choices have the same
            sequence.prompt_logprobs = []
        return sequence

    @property
    def num_completion_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def waits_for_leader(self) -> bool:
        """True while the leader's prompt is not in the cache, and may still come."""
        leader = self.leader
        return leader is not None and leader.finish_reason is None and leader.num_cached < leader.num_prompt_tokens

    @property
    def known_tokens(self) -> list[int]:
        """Tokens that need not be run where the cache holds them: nobody asks for more than it holds."""
        found = self.prompt_logprobs
        return self.tokens if found is None else self.tokens[: len(found) + 1]

    def unscored(self, count: int) -> range:
        """Places of the prompt's tokens whose log-probability comes with the next `count` tokens."""
        if self.prompt_logprobs is None:
            return range(0)
        first = max(self.num_cached, len(self.prompt_logprobs)) + 1
        return range(first, min(self.num_cached + count + 1, self.num_prompt_tokens))

    @property
    def num_pending(self) -> int:
        """Number of tokens that the model has to run before the next one can be sampled."""
        return len(self.tokens) - self.num_cached

    @property
    def is_decoding(self) -> bool:
        """True once a token was generated and only the newest is pending."""
        return self.num_pending == 1 and self.num_completion_tokens > 0
