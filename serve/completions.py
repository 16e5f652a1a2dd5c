"""`POST /v1/completions`: a prompt, or several, continued."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from ..runtime import Completion, Piece, Request
from ..runtime.engine import check_token_ids
from .access import record_of
from .bodies import decode, unknown_fields
from .errors import bad_request
from .fields import SamplingFields, TokenId, sampling_params
from .limits import MOST_LOGPROBS
from .logprobs import CompletionLogprobs, TokenLists
from .reply import Asked, Usage
from .responding import respond
from .service import Service


class CompletionRequest(SamplingFields, kw_only=True):
    """The body. echo: the answer begins with the prompt. logprobs: report tokens and so many likeliest ones."""

    prompt: str | list[str | TokenId | list[TokenId]]
    echo: bool | None = None
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: str | None = None


class CompletionChoice(msgspec.Struct):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class CompletionDocument(msgspec.Struct):
    """The answer, or a chunk of it."""

    id: str
    object: str
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType = msgspec.UNSET


@dataclass(frozen=True)
class Prompt:
    """A prompt: its tokens, and its text as the client wrote it."""

    tokens: list[int]
    text: str


class CompletionReply:
    """Documents of a completion. prompts: of the request. empty: nothing was asked for but the prompt."""

    def __init__(self, service: Service, given: CompletionRequest, prompts: Sequence[Prompt], n: int):
        self._id, self._created, self._model = f"cmpl-{secrets.token_hex(12)}", int(time.time()), service.names[0]
        self._tokenizer = service.model.tokenizer
        self._prompts, self._n = prompts, n
        self._echo = bool(given.echo)
        self._empty = given.max_tokens == 0
        self._with_logprobs = given.logprobs is not None
        self._with_ids = bool(given.return_token_ids)
        self._lists = [TokenLists(self._tokenizer) for _ in range(n * len(prompts))] if self._with_logprobs else []

    def opening(self) -> Sequence[Any]:
        if not self._echo:
            return ()
        return [self._document([CompletionChoice(index, self._prompt(index).text)]) for index in self._indices]

    def chunks(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        return [self._document([self._next(piece)]) for piece in pieces]

    def usage_chunk(self, usage: Usage) -> Any:
        return self._document([], self._counted(usage))

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Any:
        choices = [self._choice(index, completions) for index in self._indices]
        return self._document(choices, self._counted(usage))

    @property
    def _indices(self) -> range:
        return range(self._n * len(self._prompts))

    def _prompt(self, index: int) -> Prompt:
        return self._prompts[index // self._n]

    def _next(self, piece: Piece) -> CompletionChoice:
        done = piece.completion
        choice = CompletionChoice(piece.index, "", finish_reason=None if done is None else done.finish_reason)
        if self._empty:
            choice.finish_reason = None if done is None else "length"
            return choice
        choice.text = piece.text
        if self._with_ids:
            choice.token_ids = list(piece.token_ids)
        if self._with_logprobs:
            choice.logprobs = self._lists[piece.index].next(piece.logprobs)
        return choice

    def _choice(self, index: int, completions: Sequence[Completion]) -> CompletionChoice:
        done, prompt = completions[index], self._prompt(index)
        choice = CompletionChoice(index, prompt.text if self._echo else "", finish_reason=done.finish_reason)
        lists = None
        if self._with_logprobs:
            lists = self._lists[index].next(())
            if self._echo:
                lists = self._lists[index].prompt(
                    prompt.tokens, completions[index - index % self._n].prompt_logprobs or ()
                )
        if self._empty:
            choice.finish_reason = "length"
        else:
            choice.text += done.text
            if lists is not None:
                lists.extend(self._lists[index].next(done.logprobs or ()))
        choice.logprobs = lists
        if self._with_ids:
            choice.token_ids = [] if self._empty else list(done.token_ids)
            choice.prompt_token_ids = prompt.tokens
        return choice

    def _counted(self, usage: Usage) -> Usage:
        if self._empty:
            usage.total_tokens -= usage.completion_tokens
            usage.completion_tokens = 0
        return usage

    def _document(
        self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType = msgspec.UNSET
    ) -> CompletionDocument:
        return CompletionDocument(self._id, "text_completion", self._created, self._model, choices, usage)


async def completions(service: Service, http: HttpRequest, body: bytes) -> Response:
    """Answer `POST /v1/completions`."""
    asked = await service.in_thread(_asked, service, body, record_of(http.scope).key)
    return await respond(service, http, asked)


def _asked(service: Service, body: bytes, key: bytes | None) -> Asked:
    given = decode(body, CompletionRequest)
    service.metrics.unknown_fields.inc(unknown_fields(body, CompletionRequest))
    service.check_model(given.model)
    if given.suffix:
        raise bad_request("suffix is not supported: the model continues texts only", "suffix")
    if given.best_of not in (None, given.n or 1):
        raise bad_request("best_of is not supported beside n", "best_of")
    if given.stream and given.echo and given.logprobs is not None:
        raise bad_request("a stream has no logprobs of its prompt: leave out stream, echo or logprobs", "stream")
    params = sampling_params(
        given,
        service.params,
        service.limits,
        given.max_tokens or (None if given.max_tokens is None else 1),  # a step is taken for the prompt alone, too
        logprobs=given.logprobs,
        prompt_logprobs=given.logprobs if given.echo else None,
    )
    texts = _prompts(given.prompt)
    service.check_count(len(texts), params.n)
    prompts = [_prompt(service, text, bool(given.echo)) for text in texts]
    return Asked(
        Request([prompt.tokens for prompt in prompts], params, salt=service.salt(key, given.cache_salt)),
        CompletionReply(service, given, prompts, params.n),
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


def _prompt(service: Service, given: str | list[int], echo: bool) -> Prompt:
    tokenizer = service.model.tokenizer
    if isinstance(given, str):
        return Prompt(tokenizer.encode(given), given)
    if not given:
        raise bad_request("a prompt is empty: it has no tokens to continue", "prompt")
    service.check_length(len(given))
    check_token_ids(given, service.model.engine.model.config.vocab_size)
    return Prompt(given, tokenizer.decode(given) if echo else "")
