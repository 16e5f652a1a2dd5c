"""The HTTP server around the application: its socket, its connections, and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final

import uvicorn

from ..inputs.printable import error_line
from .app import make_app
from .http.protocol import Protocol
from .service import Service

_HEADER_BYTES: Final = 64 << 10
_KEEP_ALIVE_SECONDS: Final = 65
"""Longer than clients and proxies keep idle connections: one that ends first here may have a request on its way."""
_LAST_WRITES_SECONDS: Final = 5
_LAST_WORDS_SECONDS: Final = 2.0


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, for a server to listen at later; port 0 takes a free one. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found


class _Lines(logging.Handler):
    """Log records as lines, without the tracebacks that belong to them."""

    def __init__(self, log: Callable[[str], None]):
        super().__init__(logging.ERROR)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        self._log(f"{record.name}: {record.getMessage()}" + (f": {error_line(error)}" if error is not None else ""))


@contextmanager
def _logged(log: Callable[[str], None]) -> Iterator[None]:
    """Send errors of uvicorn and asyncio to the log. Their warnings are about broken clients, and go nowhere."""
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    handler = _Lines(log)
    before = [(logger, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagates in before:
            logger.removeHandler(handler)
            logger.propagate = propagates


class HttpServer(uvicorn.Server):
    """A server of one service; `run(sockets=[…])` returns when it has ended.

    A first SIGTERM or SIGINT lets it drain: new requests are refused, those that run have `drain_seconds`, and get an
    error event after that. A second signal ends the process at once. listening: called when it listens. drains: called
    with the number of requests that it waits for.
    """

    def __init__(
        self,
        service: Service,
        drain_seconds: float = 30.0,
        listening: Callable[[], None] = lambda: None,
        drains: Callable[[int], None] = lambda running: None,
    ):
        config = uvicorn.Config(
            make_app(service),
            http=Protocol,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=_HEADER_BYTES,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_LAST_WRITES_SECONDS,
        )
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._listening = listening
        self._drains = drains
        self._signal = 0
        self._deadline: float | None = None
        self._events: asyncio.AbstractEventLoop | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        with _logged(self._service.log):
            await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._events = asyncio.get_running_loop()
        await super().startup(sockets)
        self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first drains, a second ends."""
        if self._signal:
            os._exit(128 + sig)
        self._signal = sig

    def drain(self) -> None:
        """Begin the end, as a first signal does."""
        self._signal = self._signal or -1

    async def on_tick(self, counter: int) -> bool:
        ended = await super().on_tick(counter)
        return ended or (self._signal != 0 and self._is_drained())

    def _is_drained(self) -> bool:
        service, now = self._service, time.monotonic()
        if self._deadline is None:
            service.draining = True
            self._deadline = now + self._drain_seconds
            if service.num_answering:
                self._drains(service.num_answering)
        if service.num_answering and now >= self._deadline:
            service.end_requests("the server ends, and this request took too long; ask again")
            return True
        return not service.num_answering

    def last_words(self, message: str) -> None:
        """From another thread, before the process ends: end all requests with an error, and wait until it is sent."""
        service, events = self._service, self._events
        if events is None or events.is_closed():
            return
        service.draining = True
        with suppress(RuntimeError):  # it has ended meanwhile
            events.call_soon_threadsafe(service.end_requests, message)
        until = time.monotonic() + _LAST_WORDS_SECONDS
        waiting = threading.Event()
        while service.num_answering and time.monotonic() < until:
            waiting.wait(0.05)
