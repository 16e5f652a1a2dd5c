"""`POST /v1/completions`: a prompt, or several, continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..runtime import Completion, Piece, Request
from .access import record_of
from .bodies import decode, unknown_fields
from .errors import bad_request
from .fields import SamplingFields, TokenId, sampling_params
from .reply import Asked, Usage
from .responding import respond
from .service import Service


class CompletionRequest(SamplingFields, kw_only=True):
    """The body."""

    prompt: str | list[str | int | list[TokenId]]


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: Any = None
    finish_reason: str | None = None


class CompletionDocument(msgspec.Struct):
    """The answer, or a chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class CompletionReply:
    """Documents of a completion."""

    def __init__(self, model: str):
        self._id, self._created, self._model = f"cmpl-{secrets.token_hex(12)}", int(time.time()), model

    def opening(self) -> Sequence[Any]:
        return ()

    def chunks(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return [
            self._document([CompletionChoice(piece.index, piece.text, finish_reason=_reason(piece.completion))])
            for piece in pieces
        ]

    def usage_chunk(self, usage: Usage) -> Any:
        return self._document([], usage)

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Any:
        choices = [
            CompletionChoice(index, done.text, finish_reason=done.finish_reason)
            for index, done in enumerate(completions)
        ]
        return self._document(choices, usage)

    def _document(self, choices: list[CompletionChoice], usage: Any = msgspec.UNSET) -> CompletionDocument:
        return CompletionDocument(self._id, "text_completion", self._created, self._model, choices, usage)


def _reason(completion: Completion | None) -> str | None:
    return None if completion is None else completion.finish_reason


async def completions(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `POST /v1/completions`."""
    asked = await service.in_thread(_asked, service, body, record_of(http.scope).key)
    return await respond(service, http, asked)


def _asked(service: Service, body: bytes, key: bytes | None) -> Asked:
    given = decode(body, CompletionRequest)
    service.metrics.unknown_fields.inc(unknown_fields(body, CompletionRequest))
    service.check_model(given.model)
    params = sampling_params(given, service.params, service.limits, given.max_tokens)
    encode = service.model.tokenizer.encode
    prompts = [encode(prompt) if isinstance(prompt, str) else prompt for prompt in _prompts(given.prompt)]
    return Asked(
        Request(prompts, params, salt=service.salt(key, given.cache_salt)),
        CompletionReply(service.names[0]),
        stream=bool(given.stream),
        include_usage=given.stream_options is not None and bool(given.stream_options.include_usage),
    )


def _prompts(given: str | list[Any]) -> list[str | list[int]]:
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
