"""HTTP connections: uvicorn's, with limits against clients that open many and say little."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from ..limits import SEND_BYTES, SEND_SECONDS, SEND_SHARE
from .documents import encoded
from .errors import bad_request

HEAD_SECONDS: Final = 30.0
"""A request's head has to arrive within this time, from the connection's first byte or the last answer's end."""
MOST_CONNECTIONS: Final = 4096
"""Each may hold an answer that its client does not take."""
REST_SECONDS: Final = 10.0
REST_BYTES: Final = 8 << 20
"""Of a body whose answer has been sent without it: clients send all before they read. It is thrown away."""


def most_connections() -> int:
    """Connections at once: half of the files that the process may open (`ulimit -n`), and MOST_CONNECTIONS."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(soft // 2, MOST_CONNECTIONS) if soft != resource.RLIM_INFINITY else MOST_CONNECTIONS


class Protocol(H11Protocol):
    """A connection. It is closed where there are `most_connections`, when a request's head takes too long, and when the
    client takes nothing of what waits to be sent: neither its memory nor its place would come back. So it is where the
    rest of a body that nobody waits for takes too long, or is too long.
    """

    _head: asyncio.TimerHandle | None = None
    _taking: asyncio.TimerHandle | None = None
    _took = False
    """The client has taken what had stopped the writing."""
    _rest: asyncio.TimerHandle | None = None
    _rest_bytes = 0

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
        self._stop_rest()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn leaves it after a reset: it would hold all of this for a minute

    def data_received(self, data: bytes) -> None:
        cycle = self.cycle
        super().data_received(data)
        if self._rest is not None and self.cycle is cycle:
            self._rest_bytes += len(data)
            if self.conn.their_state is not h11.SEND_BODY:
                self._stop_rest()
                self._keep_alive()
            elif self._rest_bytes > REST_BYTES:
                self.transport.abort()
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._head is None and self.timeout_keep_alive_task is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def on_response_complete(self) -> None:
        cycle = self.cycle
        super().on_response_complete()
        if self.cycle is not cycle:  # the next request has begun: what comes is its own body
            self._stop_rest()
        elif self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._stop_rest()
            self._rest_bytes = 0
            self._rest = self.loop.call_later(REST_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, in OpenAI's form, and close. Behind an answer that has begun, just close."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        if self.cycle is not None:  # its task may begin behind this answer, and must not send another
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = encoded(bad_request(msg).body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def resume_writing(self) -> None:
        self._took = True
        super().resume_writing()

    def _check_taking(self, before: int) -> None:
        """Close the connection if hardly any of its unsent bytes was taken since the last look, when there were
        `before`: a client that takes a few of them now and then would hold an answer in memory for days.
        """
        left = self.transport.get_write_buffer_size()
        least = max(SEND_BYTES, before // SEND_SHARE)
        grows = not (self.flow.write_paused or self.transport.is_closing())  # then `left` does not tell what was taken
        if before and left > before - least and not self._took and not grows:
            self.transport.abort()
            return
        self._took = False
        self._taking = self.loop.call_later(SEND_SECONDS, self._check_taking, 0 if grows else left)

    def _keep_alive(self) -> None:
        """Let a connection whose body has come to its end wait for another request, as uvicorn does behind others."""
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _stop_waiting(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None

    def _stop_rest(self) -> None:
        if self._rest is not None:
            self._rest.cancel()
            self._rest = None

    def _head_is_late(self) -> None:
        self._head = None
        self.transport.abort()
