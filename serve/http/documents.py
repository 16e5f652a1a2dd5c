"""JSON that goes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
from starlette.responses import Response

_encoder: Final = msgspec.json.Encoder()

DONE: Final = b"data: [DONE]\n\n"
PING: Final = b": ping\n\n"
"""A comment, which clients skip."""


def encoded(document: Any) -> bytes:
    """A document of structs, dicts, lists, texts and numbers as JSON."""
    return _encoder.encode(document)


def json_response(document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response with one document."""
    return Response(encoded(document), status, headers, media_type="application/json")


def events(documents: Iterable[Any]) -> bytes:
    """Server-sent events, one a document."""
    return b"".join([b"data: %b\n\n" % _encoder.encode(document) for document in documents])
