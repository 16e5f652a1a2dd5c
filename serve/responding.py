"""Answers of a generation: one document, or a stream of server-sent events. Both end it when their client is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, Final, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import GenerationError
from ..inputs.printable import error_line
from ..runtime import Completion, Piece, Request
from .engine_thread import Generation
from .http.access import Record, record_of
from .http.documents import DONE, PING, events, json_response
from .http.errors import ApiError, EndedError, failure
from .limits import PING_SECONDS
from .reply import Asked, Usage
from .service import Service

T = TypeVar("T")

_FEW_TOKENS: Final = 4096
"""Tokens, with the likeliest beside them, of a document that the event loop makes by itself: each may take 10 µs."""


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads an answer."""


async def respond(service: Service, http: HttpRequest, asked: Asked) -> Response:
    """Admit a request and answer it. The body of `http` has been read. Raises ApiError for one that is refused."""
    record = record_of(http.scope)
    answer = _Answer(service, service.admit(asked.request, as_one=not asked.stream), asked, record)
    with ExitStack() as ending:
        ending.callback(answer.end)
        if service.log_prompts:
            await service.in_thread(_log_prompts, service, asked.request, record)
        if asked.stream:
            ending.pop_all()
            return _StreamedAnswer(answer)
        try:
            return await _while_connected(http.receive, answer.whole())
        except GenerationError as error:
            raise failure(error, service.failure_status) from None


def _log_prompts(service: Service, request: Request, record: Record) -> None:
    for prompt in request.prompts:
        service.log(f"{record.id} prompt: {service.model.tokenizer.decode(prompt)}")


class _Answer:
    """A generation and the reply made of it, with a look at the clock."""

    def __init__(self, service: Service, generation: Generation, asked: Asked, record: Record):
        self.service = service
        self._generation = generation
        self._asked = asked
        self._record = record
        self._done: dict[int, Completion] = {}
        self._begun: set[int] = set()  # completions whose prompt was written
        self._last = 0.0
        seconds = service.limits.request_seconds
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._out_of_time) if seconds else None

    async def whole(self) -> Response:
        """The one document; a large one is made and encoded in a thread."""
        async for pieces in self._generation.batches():
            self._watch(pieces)
        whole, completions, usage = self._asked.reply.whole, self._completions(), self._usage()
        params = self._asked.request.params
        # Each choice repeats its prompt's log-probabilities.
        tokens = usage.total_tokens * (1 if params.prompt_logprobs is None else params.n)
        if tokens * (1 + (params.logprobs or 0)) <= _FEW_TOKENS:
            return json_response(whole(completions, usage))
        return await self.service.in_thread(lambda: json_response(whole(completions, usage)))

    async def parts(self) -> AsyncIterator[bytes]:
        """The stream, in parts of one or more events; a failure is its last event."""
        reply = self._asked.reply
        if opening := events(reply.opening()):
            yield opening
        try:
            async for pieces in self._generation.batches(PING_SECONDS):
                self._watch(pieces)
                if not pieces:
                    yield PING
                    continue
                async for prompt in self._prompts(pieces):
                    yield prompt
                if chunks := events(reply.chunks(pieces)):
                    yield chunks
        except GenerationError as error:
            yield events([failure(error, self.service.failure_status).body()])
            return
        except Exception as error:  # the answer has begun: no other place could tell the client
            self.service.log(f"{self._record.id} internal error: {type(error).__name__}: {error_line(error)}")
            yield events([ApiError(500, f"internal error: {type(error).__name__}").body()])
            return
        usage = events([reply.usage_chunk(self._usage())]) if self._asked.include_usage else b""
        yield usage + DONE

    async def _prompts(self, pieces: Sequence[Piece]) -> AsyncIterator[bytes]:
        """Prompts with their log-probabilities, each before the first of these pieces of its completion."""
        chunk, sequences, n = self._asked.prompt_chunk, self._generation.sequences, self._asked.request.params.n
        if chunk is None:
            return
        for index in dict.fromkeys(piece.index for piece in pieces):
            if index in self._begun:
                continue
            self._begun.add(index)
            found = sequences[index - index % n].prompt_logprobs or ()
            if len(found) * (1 + (self._asked.request.params.logprobs or 0)) <= _FEW_TOKENS:
                yield events([chunk(index, found)])
            else:
                yield await self.service.in_thread(lambda index, found: events([chunk(index, found)]), index, found)

    def end(self) -> None:
        """End the generation, where it still runs, and note how it went."""
        if self._deadline is not None:
            self._deadline.cancel()
        service, request = self.service, self._asked.request
        gone = self._generation.open and self._generation.error is None
        service.release(self._generation)
        service.metrics.latency.observe(time.perf_counter() - self._record.started)
        if gone:
            service.metrics.cancelled.inc()
        firsts = self._generation.sequences[:: request.params.n]
        reasons = sorted({done.finish_reason for done in self._done.values()})
        self._record.notes |= {
            "prompt_tokens": sum(first.num_prompt_tokens for first in firsts),
            "cached_tokens": sum(first.num_reused or 0 for first in firsts),
            "new_tokens": sum(sequence.num_completion_tokens for sequence in self._generation.sequences),
            "finish": "cancelled" if gone else "error" if self._generation.error is not None else ",".join(reasons),
        }

    def _watch(self, pieces: Sequence[Piece]) -> None:
        if not pieces:
            return
        metrics, now = self.service.metrics, time.perf_counter()
        if not self._last:
            first = (self._generation.first_at or now) - self._record.started
            metrics.first_token.observe(first)
            self._record.notes["first_token"] = f"{first:.3f}s"
            entered = self._generation.sequences[0].entered_at
            if entered is not None:
                metrics.queue_time.observe(entered - self._generation.admitted_at)
        else:
            tokens = sum(len(piece.token_ids) for piece in pieces) / len(pieces)
            if tokens:
                metrics.inter_token.observe((now - self._last) / tokens)
        self._last = now
        for piece in pieces:
            if piece.completion is not None:
                self._done[piece.index] = piece.completion
                metrics.completed(piece.completion, piece.index % self._asked.request.params.n == 0)

    def _completions(self) -> list[Completion]:
        return [self._done[index] for index in range(len(self._done))]

    def _usage(self) -> Usage:
        return Usage.of(self._completions(), self._asked.request.params.n)

    def _out_of_time(self) -> None:
        seconds = self.service.limits.request_seconds
        self._generation.fail(EndedError(504, f"the answer took more than {seconds:g} s, the limit of this server"))


class _StreamedAnswer(Response):
    """Server-sent events of an answer, as they come."""

    def __init__(self, answer: _Answer):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._answer = answer
        answer.service.leave_open()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await _first_of(self._write(send), _disconnected(receive))
        finally:
            self._answer.end()
            self._answer.service.close()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._answer.parts():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises ClientGoneError when the client is gone before."""
    working = asyncio.ensure_future(work)
    await _first_of(working, _disconnected(receive))
    if working.cancelled():
        raise ClientGoneError
    return working.result()


async def _first_of(*works: Coroutine[Any, Any, Any] | asyncio.Future[Any]) -> None:
    """Wait for one of these and cancel the others. Raises what those that are done raise."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
