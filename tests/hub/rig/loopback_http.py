"""How a loopback hub speaks HTTP: requests are noted and run into their faults, answers are written, users known."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from faults import Fault
from loopback_state import RefusedError, Repo, User

CHUNK = 1 << 20


@dataclass
class Seen:
    """One request, for assertions, noted when it begins. Bytes of its body and of its answer's, so far."""

    request: str
    authorization: str | None
    range: str | None
    received: int = 0
    sent: int = 0


class DroppedError(Exception):
    """The connection was reset on purpose."""


class Exchange(BaseHTTPRequestHandler):
    """One request and its answer, by the first of `routes` that fits: methods, pattern of the path, method to call."""

    hub: Any  # the LoopbackHub
    routes: list[tuple[tuple[str, ...], str, Callable[..., None]]]
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def log_message(self, format: str, *args: Any) -> None:
        return

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # the other side has gone
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(ConnectionError):
            super().finish()

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.route, self.query = unquote(parts.path), parse_qs(parts.query)
        self.raw_route = parts.path
        request = f"{self.command} {self.route}"
        self.seen = Seen(request, self.headers.get("Authorization"), self.headers.get("Range"))
        self.hub.log.append(self.seen)
        self.fault = self.hub.faults.meet(request) or Fault("")
        try:
            self._answer()
            self.wfile.flush()
        except RefusedError as refusal:
            self._refuse(refusal)
        except DroppedError:
            self._drop()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _answer(self) -> None:
        if self.fault.reset_before:
            raise DroppedError
        if self.fault.status is not None:
            self._discard_body()
            raise RefusedError(self.fault.status, self.fault.said, self.fault.code)
        for method, pattern, action in self.routes:
            match = re.fullmatch(pattern, self.route)
            if match is not None and self.command in method:
                action(self, *match.groups())
                return
        self._discard_body()
        raise RefusedError(404, f"no route {self.command} {self.route}")

    def _refuse(self, refusal: RefusedError) -> None:
        body = json.dumps({"error": refusal.message, **refusal.details}).encode()
        headers = {"X-Error-Message": refusal.message, **self.fault.headers}
        if refusal.code is not None:
            headers["X-Error-Code"] = refusal.code
        try:
            self._write(refusal.status, headers, body)
            self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _drop(self) -> None:
        self.wfile.flush()
        # Linger of zero: the peer gets a reset, not an orderly end.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _write(self, status: int, headers: dict[str, str], body: bytes) -> None:
        if self.fault.lose_response:
            raise DroppedError
        body = body if self.fault.body is None else self.fault.body
        self._begin(status, {"Content-Length": str(len(body)), **headers})
        if self.command != "HEAD":
            self.wfile.write(body)
            self.seen.sent += len(body)
            self._exceed()

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        """The status and the headers, which are wrong where a fault says so."""
        length = int(headers["Content-Length"]) + self.fault.longer
        headers = {**headers, "Content-Length": str(length), **self.fault.sent_headers}
        if self.fault.endless:
            del headers["Content-Length"]
            self.close_connection = True
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _exceed(self) -> None:
        """Send what nobody asked for, until the other side has had enough."""
        piece = b" " * CHUNK
        left = 1 << 40 if self.fault.endless else self.fault.longer
        while left:
            self.wfile.write(piece[:left])
            self.seen.sent += len(piece[:left])
            left -= len(piece[:left])

    def _json(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if status == 200:
            content = self.hub.say(self.seen.request, content)
        self._write(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(content).encode())

    def _read_body(self) -> bytes:
        pieces: list[bytes] = []
        self._receive(pieces.append)
        return b"".join(pieces)

    def _discard_body(self) -> None:
        self._receive(lambda piece: None)

    def _receive(self, take: Callable[[bytes], object]) -> None:
        left = int(self.headers.get("Content-Length", 0))
        while left:
            wanted = min(left, CHUNK)
            if self.fault.reset_after is not None and self.command in ("PUT", "POST"):
                wanted = min(wanted, self.fault.reset_after - self.seen.received)
                if wanted <= 0:
                    raise DroppedError
            if self.fault.bytes_per_second is not None:
                wanted = min(wanted, max(1, self.fault.bytes_per_second // 50))
                time.sleep(wanted / self.fault.bytes_per_second)
            piece = self.rfile.read(wanted)
            if not piece:
                raise ConnectionResetError
            take(piece)
            self.seen.received += len(piece)
            left -= len(piece)

    def _user(self) -> User | None:
        authorization = self.headers.get("Authorization")
        if authorization is None:
            return None
        user = self.hub.state.users.get(authorization.removeprefix("Bearer "))
        if user is None:
            self._discard_body()
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, name: str, write: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.state.repos.get(name)
        owner = name.partition("/")[0]
        if repo is None or (repo.private and (user is None or user.name != owner)):
            self._discard_body()
            raise RefusedError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and (user is None or user.role != "write" or user.name != owner):
            self._discard_body()
            raise RefusedError(403, "You don't have the rights to write to this repository")
        return repo
