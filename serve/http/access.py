"""Who may use a server: keys, hosts and origins. And what each request leaves: an id, and a line in the log.

Plain ASGI: Starlette's own base for middleware hides from an endpoint that its client is gone.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .documents import json_response
from .errors import ApiError

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_QUIET: Final = frozenset({"/health", "/ready", "/metrics"})
"""Paths that monitoring asks for every few seconds: only their failures are logged."""


@dataclass(frozen=True)
class Access:
    """Rules of access.

    keys: digests (`key_digest`) of the keys, one of which a request has to bring; none: no key is needed. hosts: names
    by which the server may be called; none: any. origins: of web pages that may call it, beside its own. open_paths:
    need no key.
    """

    keys: tuple[bytes, ...] = ()
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    open_paths: frozenset[str] = frozenset({"/", "/health", "/ready"})

    @classmethod
    def of(
        cls,
        keys: Iterable[str] = (),
        hosts: Iterable[str] = (),
        origins: Iterable[str] = (),
        *,
        open_metrics: bool = False,
    ) -> Access:
        """Rules for keys as clients send them."""
        open_paths = cls.open_paths | ({"/metrics"} if open_metrics else frozenset())
        return cls(tuple(map(key_digest, keys)), tuple(map(str.lower, hosts)), tuple(origins), open_paths)

    def check(self, headers: Headers, path: str) -> bytes | None:
        """The digest of the key that a request brings; None where none is needed. Raises ApiError."""
        if has_two_lengths(headers):
            raise ApiError(400, "a body has one length: not both of two headers", headers={"Connection": "close"})
        host = headers.get("host", "")
        if self.hosts and _without_port(host) not in self.hosts:
            raise ApiError(400, "this server is not known by this name; its owner can allow it with --allowed-host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and (not host or origin.partition("://")[2] != host):
            raise ApiError(
                403, "pages of this origin may not call the server; its owner can allow it with --cors-origin"
            )
        if not self.keys or (path.rstrip("/") or "/") in self.open_paths:
            return None
        given = key_digest(_bearer(headers.get("authorization", "")))
        other = key_digest(headers.get("api-key", "").strip())
        # All are compared: how long it takes tells nothing.
        found = [key for key in self.keys for each in (given, other) if hmac.compare_digest(key, each)]
        if not found:
            raise ApiError(
                401,
                "no valid key: send it as `Authorization: Bearer KEY`",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return found[0]


def has_two_lengths(headers: Headers) -> bool:
    """True for a body of which a proxy, going by the other length, would take the rest for somebody's next request."""
    return "transfer-encoding" in headers and "content-length" in headers


def loopback_hosts() -> tuple[str, ...]:
    """Names of a server that only its own machine reaches.

    A web page's own name may be made to point there: its browser then sends that name.
    """
    return ("localhost", "127.0.0.1", "[::1]")


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _bearer(header: str) -> str:
    """The key of an Authorization header; empty for another scheme."""
    scheme, _, key = header.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _without_port(host: str) -> str:
    return re.sub(r":[0-9]*$", "", host).lower()


@dataclass
class Record:
    """Facts of a request, for the log."""

    id: str
    key: bytes | None = None
    started: float = field(default_factory=time.perf_counter)
    status: int = 0
    notes: dict[str, object] = field(default_factory=dict)
    """Words for the log's line, as `name=value`: of numbers and of npuq's own names, never of the request's text."""


def record_of(scope: Scope) -> Record:
    """The record of a request."""
    record: Record = scope["npuq.record"]
    return record


class Gate:
    """Middleware around an application: gives a request its record, checks access, logs its end."""

    def __init__(self, app: ASGIApp, access: Access, log: Callable[[str], None]):
        self._app = app
        self._access = access
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        record = Record(given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}")
        scope["npuq.record"] = record

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        try:
            try:
                record.key = self._access.check(headers, scope["path"])
            except ApiError as error:
                await json_response(error.body(), error.status, error.headers)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        finally:
            if scope["path"] not in _QUIET or record.status >= 500:
                self._log(_line(record, scope))


def _line(record: Record, scope: Scope) -> str:
    seconds = time.perf_counter() - record.started
    words: Sequence[Any] = [
        record.id,
        scope["method"][:16],
        scope["raw_path"].decode("ascii", "replace")[:100],  # escaped: a space would begin another word of the line
        record.status or "gone",
        f"{seconds:.3f}s",
        *(f"{name}={value}" for name, value in record.notes.items()),
    ]
    return " ".join(map(str, words))
