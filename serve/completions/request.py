"""The body of a completion request, and the prompts in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from ...runtime.engine import check_token_ids
from ..fields import SamplingFields, TokenId
from ..http.errors import bad_request
from ..limits import MOST_LOGPROBS
from ..service import Service


class CompletionRequest(SamplingFields, kw_only=True):
    """The body. echo: the answer begins with the prompt. logprobs: report tokens and so many likeliest ones."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, and its text as the client wrote it."""

    tokens: list[int]
    text: str


def prompts_of(given: str | list[Any]) -> list[str | list[int]]:
    """The prompts of a body: a text, token ids, or a list of either."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise bad_request("prompt is an empty list", "prompt")
    if all(isinstance(entry, int) for entry in given):
        return [given]
    if any(isinstance(entry, int) for entry in given):
        raise bad_request("prompt mixes token ids with prompts", "prompt")
    return given


def prompt_of(service: Service, given: str | list[int], echo: bool) -> Prompt:
    tokenizer = service.model.tokenizer
    if isinstance(given, str):
        return Prompt(tokenizer.encode(given), given)
    if not given:
        raise bad_request("a prompt is empty: it has no tokens to continue", "prompt")
    service.check_length(len(given))
    check_token_ids(given, service.model.engine.model.config.vocab_size)
    return Prompt(given, tokenizer.decode(given) if echo else "")
