"""A server that says what a test tells it to, byte by byte."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
HANG = object()
"""In the place of bytes: wait until the client closes the connection."""

ASKED = object()
"""In the place of bytes: set the event `asked`."""


def document(status: str, value: Any, headers: str = "") -> bytes:
    """A response with a JSON document."""
    body = json.dumps(value).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode() + body


def event(value: Any) -> bytes:
    """A server-sent event with a JSON document."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def delta(reason: str | None = None, **fields: Any) -> bytes:
    """A chunk of a chat completion."""
    return event({"choices": [{"index": 0, "delta": fields, "finish_reason": reason}]})


DONE = b"data: [DONE]\n\n"


@dataclass
class ScriptedServer:
    """Answers the nth request with the nth script: pieces of bytes, or HANG. requests: (head, body) of each."""

    scripts: Iterable[Iterable[Any]]
    requests: list[tuple[str, bytes]] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)
    left: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        for script in self.scripts:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(120)
                self.requests.append(_request(connection))
                try:
                    for part in script:
                        if part is ASKED:
                            self.asked.set()
                        elif part is HANG:
                            assert connection.recv(1) == b""
                            self.left.set()
                        else:
                            connection.sendall(part)
                except OSError:  # the client has had enough
                    self.left.set()


def _request(connection: socket.socket) -> tuple[str, bytes]:
    content = b""
    while b"\r\n\r\n" not in content:
        content += connection.recv(1 << 16)
    head, _, body = content.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while lengths and len(body) < int(lengths[0]):
        body += connection.recv(1 << 16)
    return head.decode(), body
