"""The answer to a completion request, as one document or in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from ...runtime import Completion, Piece, TokenLogprobs
from ..logprobs import CompletionLogprobs, TokenLists
from ..reply import Usage
from ..service import Service
from .request import CompletionRequest, Prompt


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
        if not self._echo or self._with_logprobs:  # those come with the prompt's steps
            return ()
        return [self._document([CompletionChoice(index, self._prompt(index).text)]) for index in self._indices]

    def prompt_chunk(self, index: int, logprobs: Sequence[TokenLogprobs]) -> Any:
        """The chunk of a completion's prompt, before its first piece."""
        prompt = self._prompt(index)
        lists = self._lists[index].prompt(prompt.tokens, logprobs)
        return self._document([CompletionChoice(index, prompt.text, lists)])

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
