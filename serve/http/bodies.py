"""Bodies of requests: the one place where JSON from a client is read and decoded."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from starlette.requests import Request as HttpRequest

from ...inputs.printable import error_line
from ...parallel.collector import collector_paused
from ..limits import BODY_SECONDS
from .errors import ApiError, bad_request

T = TypeVar("T")


async def read_body(http: HttpRequest, most: int) -> bytes:
    """The body of a request. Raises ApiError for one that is too long or too slow."""
    try:
        length = int(http.headers.get("content-length", "0"))
    except ValueError:
        length = 0  # h11 refuses it
    if length > most:
        raise _too_long(most)
    try:
        return await asyncio.wait_for(_read(http, most), BODY_SECONDS)
    except asyncio.TimeoutError:
        closed = {"Connection": "close"}
        raise ApiError(408, f"the body did not arrive within {BODY_SECONDS:g} s", headers=closed) from None


async def _read(http: HttpRequest, most: int) -> bytes:
    parts, length = [], 0
    async for part in http.stream():
        length += len(part)
        if length > most:
            raise _too_long(most)
        parts.append(part)
    return b"".join(parts)


def _too_long(most: int) -> ApiError:
    # The rest of the body is not read: the connection cannot be used again.
    return ApiError(413, f"the body is longer than {most} bytes", headers={"Connection": "close"})


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a body as `kind`. Raises ApiError, status 400, with the path of the field at fault."""
    try:
        with collector_paused():
            return msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise bad_request(error_line(error), _field(str(error))) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error_line(error)}") from None


def unknown_fields(body: bytes, kind: type[msgspec.Struct]) -> int:
    """Number of fields of a body, decoded before, that a struct of `kind` does not have.

    Raises ApiError, status 400, for a field whose name is no text: `decode` does not look at it.
    """
    fields = decode(body, dict[str, msgspec.Raw])
    return len(fields.keys() - set(kind.__struct_encode_fields__))


def _field(message: str) -> str | None:
    """The field that a message of msgspec ends with, as in "… - at `$.n`"."""
    _, found, path = message.rpartition("`$.")
    return path.rstrip("`").split(".")[0].split("[")[0] if found else None
