"""The answer to a chat request, as one document or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from ...runtime import Completion, Piece, Tokenizer, TokenLogprobs
from ..logprobs import finite
from ..reply import Usage

Unset = msgspec.UnsetType


class TopLogprob(msgspec.Struct):
    """A token and its log-probability. bytes: those it stands for. token: their text, U+FFFD for what is no UTF-8."""

    token: str
    logprob: float
    bytes: list[int]


class ContentLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(msgspec.Struct):
    """Of the content's tokens: neither reasoning nor calls have any."""

    content: list[ContentLogprob]
    refusal: None = None


class CallFunction(msgspec.Struct, omit_defaults=True):
    name: str | Unset = msgspec.UNSET
    arguments: str = msgspec.field(default_factory=str)


class CallPart(msgspec.Struct):
    """A tool call, or a part of one: its id, type and name come once."""

    function: CallFunction
    index: int | Unset = msgspec.UNSET
    id: str | Unset = msgspec.UNSET
    type: Literal["function"] | Unset = msgspec.UNSET


class Message(msgspec.Struct):
    """The model's message. Reasoning has two names: clients read one or the other."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    refusal: None = None
    reasoning_content: str | Unset = msgspec.UNSET
    reasoning: str | Unset = msgspec.UNSET
    tool_calls: list[CallPart] | Unset = msgspec.UNSET


class Delta(msgspec.Struct):
    """A part of the message: of its content, of its reasoning, or of a call."""

    role: Literal["assistant"] | Unset = msgspec.UNSET
    content: str | Unset = msgspec.UNSET
    reasoning_content: str | Unset = msgspec.UNSET
    reasoning: str | Unset = msgspec.UNSET
    tool_calls: list[CallPart] | Unset = msgspec.UNSET


class Choice(msgspec.Struct):
    index: int
    message: Message
    finish_reason: str
    logprobs: ChoiceLogprobs | None = None
    token_ids: Sequence[int] | Unset = msgspec.UNSET


class ChunkChoice(msgspec.Struct):
    index: int
    delta: Delta
    finish_reason: str | None = None
    logprobs: ChoiceLogprobs | None = None
    token_ids: Sequence[int] | Unset = msgspec.UNSET


class ChatDocument(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice] | list[ChunkChoice]
    usage: Usage | Unset = msgspec.UNSET
    prompt_token_ids: Sequence[int] | Unset = msgspec.UNSET


class ChatReply:
    """Documents of a chat request (`Reply` of serve/reply.py).

    choices: number of completions. prompt: its token ids, for a client that asks for ids.
    """

    def __init__(self, model: str, tokenizer: Tokenizer, choices: int, prompt: Sequence[int] | None = None):
        self._id, self._created, self._model = f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model
        self._tokenizer = tokenizer
        self._choices = choices
        self._prompt = prompt

    def opening(self) -> Sequence[Any]:
        first = [self._chunk(ChunkChoice(index, Delta(role="assistant"))) for index in range(self._choices)]
        if self._prompt is not None:
            first[0].prompt_token_ids = self._prompt
        return first

    def chunks(self, pieces: Sequence[Piece]) -> Sequence[Any]:
        chunks = []
        for piece in pieces:
            if piece.text or piece.reasoning or piece.call is not None:
                logprobs = self._logprobs(piece.logprobs) if piece.text and piece.logprobs else None
                choice = ChunkChoice(piece.index, _delta(piece), logprobs=logprobs)
                if self._prompt is not None:
                    choice.token_ids = piece.token_ids
                chunks.append(self._chunk(choice))
            if piece.completion is not None:
                chunks.append(self._chunk(ChunkChoice(piece.index, Delta(), piece.completion.finish_reason)))
        return chunks

    def usage_chunk(self, usage: Usage) -> Any:
        return ChatDocument(self._id, "chat.completion.chunk", self._created, self._model, [], usage)

    def whole(self, completions: Sequence[Completion], usage: Usage) -> Any:
        choices = [self._choice(index, completion) for index, completion in enumerate(completions)]
        document = ChatDocument(self._id, "chat.completion", self._created, self._model, choices, usage)
        if self._prompt is not None:
            document.prompt_token_ids = self._prompt
        return document

    def _chunk(self, choice: ChunkChoice) -> ChatDocument:
        return ChatDocument(self._id, "chat.completion.chunk", self._created, self._model, [choice])

    def _choice(self, index: int, done: Completion) -> Choice:
        message = Message(content=done.text if done.text or not done.tool_calls else None)
        if done.reasoning:
            message.reasoning_content = message.reasoning = done.reasoning
        if done.tool_calls:
            message.tool_calls = [
                CallPart(CallFunction(call.name, call.arguments), id=call.id, type="function")
                for call in done.tool_calls
            ]
        logprobs = None if done.logprobs is None else self._logprobs(done.logprobs)
        choice = Choice(index, message, done.finish_reason, logprobs)
        if self._prompt is not None:
            choice.token_ids = done.token_ids
        return choice

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChoiceLogprobs:
        return ChoiceLogprobs(
            [
                ContentLogprob(
                    *self._token(entry.token, entry.logprob),
                    [TopLogprob(*self._token(token, logprob)) for token, logprob in entry.top],
                )
                for entry in entries
            ]
        )

    def _token(self, id: int, logprob: float) -> tuple[str, float, list[int]]:
        content = self._tokenizer.token_bytes(id)
        return content.decode("utf-8", "replace"), finite(logprob), list(content)


def _delta(piece: Piece) -> Delta:
    call = piece.call
    if call is not None:
        part = CallPart(CallFunction(arguments=call.arguments), call.index)
        if call.name is not None:
            assert call.id is not None
            part = CallPart(CallFunction(call.name, call.arguments), call.index, call.id, "function")
        return Delta(tool_calls=[part])
    if piece.reasoning:
        return Delta(reasoning_content=piece.reasoning, reasoning=piece.reasoning)
    return Delta(content=piece.text)
