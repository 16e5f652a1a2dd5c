"""What an endpoint makes of the pieces of a request. `/v1/completions` is one; chat is another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from ..runtime import Completion, Piece, Request, TokenLogprobs


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct):
    reasoning_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request; those of a prompt are counted once for all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, completions: Sequence[Completion], n: int) -> Usage:
        prompt = sum(done.prompt_tokens for done in completions[::n])
        new = sum(done.completion_tokens for done in completions)
        cached = sum(done.cached_tokens for done in completions[::n])
        reasoning = sum(done.reasoning_tokens for done in completions)
        details = PromptTokensDetails(cached), CompletionTokensDetails(reasoning)
        return cls(prompt, new, prompt + new, *details)


class Reply(Protocol):
    """The documents of one request's answer; each is encoded by msgspec.

    As a stream: `opening`, then `chunks` for each batch of pieces, which end with each completion, then `usage_chunk`
    if the client asked for it. As one document: `whole`, from the completions in their order; nothing else is called.
    """

    def opening(self) -> Sequence[Any]: ...

    def chunks(self, pieces: Sequence[Piece]) -> Sequence[Any]: ...

    def usage_chunk(self, usage: Usage) -> Any: ...

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Any: ...


@dataclass(frozen=True)
class Asked:
    """A request, decoded and checked.

    stream, include_usage: how it is answered. reply: by what documents. prompt_chunk: makes the one of a completion's
    prompt, from its number and the prompt's log-probabilities, where a stream has it before the completion's pieces.
    """

    request: Request
    reply: Reply
    stream: bool = False
    include_usage: bool = False
    prompt_chunk: Callable[[int, Sequence[TokenLogprobs]], Any] | None = None
