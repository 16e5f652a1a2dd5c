"""Limits for ModelScope's client, which reads answers, errors and redirects of any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import requests
from requests.adapters import BaseAdapter
from urllib3.util import Retry

from ...errors import HubError
from ..transfer.limits import MOST_REDIRECTS

# The limit of an error's body, which the client reads for its reason.
_MOST_REASON_BYTES: Final = 64 << 10


def limit_answers(client: Any, most: int) -> None:
    """Make a client of `modelscope_hub` read at most `most` bytes of an answer, little of an error, none of a redirect.

    Content is not limited here: the readers of `Range` requests count its bytes. Raises HubError for a client with
    other internals.
    """
    sessions = [value for value in vars(client).values() if isinstance(value, requests.Session)]
    if not sessions:
        raise HubError(f"this version of ModelScope's client is not known: {type(client).__name__} has no session")
    for session in sessions:
        session.max_redirects = MOST_REDIRECTS
        for prefix in ("https://", "http://"):
            session.mount(prefix, _LimitedAdapter(session.get_adapter(prefix), most))


class _LimitedAdapter(BaseAdapter):
    def __init__(self, inner: Any, most: int):
        super().__init__()
        self._inner = inner
        self._most = most
        inner.max_retries = _UnreadRetry.like(inner.max_retries)

    def send(self, request: requests.PreparedRequest, *arguments: Any, **options: Any) -> requests.Response:
        response: requests.Response = self._inner.send(request, *arguments, **options)
        if response.is_redirect:
            # Without this the client would read a redirect's body before following it.
            response.raw.close()
        elif response.status_code >= 400:
            response.raw = _LimitedBody(response.raw, _MOST_REASON_BYTES, None)
        elif "Range" not in request.headers:
            refusal = HubError(f"ModelScope sends more than the {self._most} bytes that npuq reads of an answer")
            response.raw = _LimitedBody(response.raw, self._most, refusal)
        return response

    def close(self) -> None:
        self._inner.close()


class _UnreadRetry(Retry):
    """The client's retries, without reading the body of a rejected answer."""

    @classmethod
    def like(cls, other: Retry) -> _UnreadRetry:
        return cls(
            total=other.total,
            connect=other.connect,
            read=other.read,
            redirect=other.redirect,
            status=other.status,
            other=other.other,
            allowed_methods=other.allowed_methods,
            status_forcelist=other.status_forcelist,
            backoff_factor=other.backoff_factor,
            raise_on_redirect=other.raise_on_redirect,
            raise_on_status=other.raise_on_status,
            respect_retry_after_header=other.respect_retry_after_header,
        )

    def increment(self, method: Any = None, url: Any = None, response: Any = None, *rest: Any, **named: Any) -> Any:
        if response is not None:
            response.close()
        return super().increment(method, url, response, *rest, **named)


class _LimitedBody:
    """A body that ends, or raises `refusal`, after `most` decoded bytes."""

    def __init__(self, raw: Any, most: int, refusal: HubError | None):
        self._raw = raw
        self._left = most
        self._refusal = refusal

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._raw, name)
        if name not in ("read", "read1"):
            return found
        return lambda *arguments, **options: self._counted(found(*arguments, **options))

    def stream(self, *arguments: Any, **options: Any) -> Iterator[bytes]:
        """Stream the body as urllib3 does."""
        for piece in self._raw.stream(*arguments, **options):
            if counted := self._counted(piece):
                yield counted

    def _counted(self, piece: bytes) -> bytes:
        kept = piece[: self._left]
        self._left -= len(kept)
        if len(kept) < len(piece):
            self._raw.close()
            if self._refusal is not None:
                raise self._refusal
        return kept
