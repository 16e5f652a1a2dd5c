"""HTTP connections: uvicorn's, with limits against clients that open many and say little."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..limits import SEND_SECONDS

HEAD_SECONDS: Final = 30.0
"""A request's head has to arrive within this time, from the connection's first byte or the last answer's end."""


def most_connections() -> int:
    """Connections at once: half of the files that the process may open (`ulimit -n`)."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft // 2 if soft != resource.RLIM_INFINITY else 1 << 16


class Protocol(H11Protocol):
    """A connection. It is closed where there are `most_connections`, when a request's head takes too long, and when the
    client takes nothing of what waits to be sent: neither its memory nor its place would come back.
    """

    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _took = False
    """The client has taken what had stopped the writing."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if len(self.connections) > most_connections():
            self.transport.abort()
            return
        self._head = self.loop.call_later(HEAD_SECONDS, self._head_is_late)
        self._taking = self.loop.call_later(SEND_SECONDS, self._check_taking, 0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        if self._taking is not None:
            self._taking.cancel()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it after a reset: it would hold all of this for a minute

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def resume_writing(self) -> None:
        self._took = True
        super().resume_writing()

    def _check_taking(self, before: int) -> None:
        """Close the connection if none of its unsent bytes was taken since the last look, when there were `before`."""
        left = self.transport.get_write_buffer_size()
        if before and left >= before and not self._took and (self.flow.write_paused or self.transport.is_closing()):
            self.transport.abort()
            return
        self._took = False
        self._taking = self.loop.call_later(SEND_SECONDS, self._check_taking, left)

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _head_is_late(self) -> None:
        self._head = None
        self.transport.abort()
