"""Answers of a generation: one document, or a stream of server-sent events. Both end it when their client is gone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ..errors import GenerationError
from ..runtime import Completion
from .engine_thread import Generation
from .errors import ApiError
from .reply import Asked, Usage
from .service import Service

_PING_SECONDS = 15.0
_SEND_SECONDS = 60.0
_encoder = msgspec.json.Encoder()


class ClientGoneError(Exception):
    """The client has closed its connection: nobody reads an answer."""


def json_response(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(_encoder.encode(document), status, headers, media_type="application/json")


async def respond(service: Service, http: HttpRequest, asked: Asked) -> Response:
    """Admit a request and answer it. The body of `http` has been read. Raises ApiError for one that is refused."""
    generation = service.admit(asked.request)
    if asked.stream:
        return StreamedResponse(service, generation, asked)
    try:
        completions = await _while_connected(http, _collect(generation))
    except GenerationError as error:
        raise ApiError(500, str(error)) from None
    finally:
        service.release(generation)
    return json_response(asked.reply.whole(completions, Usage.of(completions, asked.request.params.n)))


async def _collect(generation: Generation) -> list[Completion]:
    done: dict[int, Completion] = {}
    async for pieces in generation.batches():
        done.update((piece.index, piece.completion) for piece in pieces if piece.completion is not None)
    return [done[index] for index in range(len(done))]


async def _while_connected(http: HttpRequest, work: Any) -> Any:
    """The result of `work`; cancelled when the client is gone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(http.receive))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        working.cancel()
        gone.cancel()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


class StreamedResponse(Response):
    """Server-sent events of a generation, as they come."""

    def __init__(self, service: Service, generation: Generation, asked: Asked):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self._service = service
        self._generation = generation
        self._asked = asked

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait((writing, gone), return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            writing.cancel()
            gone.cancel()
            self._service.release(self._generation)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._parts():
            body = {"type": "http.response.body", "body": part, "more_body": True}
            await asyncio.wait_for(send(body), _SEND_SECONDS)
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _parts(self) -> AsyncIterator[bytes]:
        reply = self._asked.reply
        done: dict[int, Completion] = {}
        opening = _events(reply.opening())
        if opening:
            yield opening
        try:
            async for pieces in self._generation.batches():
                done.update((piece.index, piece.completion) for piece in pieces if piece.completion is not None)
                events = _events(reply.chunks(pieces))
                if events:
                    yield events
        except GenerationError as error:
            yield _events([ApiError(500, str(error)).body()])
            return
        if self._asked.include_usage:
            completions = [done[index] for index in range(len(done))]
            yield _events([reply.usage_chunk(Usage.of(completions, self._asked.request.params.n))])


def _events(documents: Any) -> bytes:
    return b"".join(b"data: %b\n\n" % _encoder.encode(document) for document in documents)
