"""Bodies of requests: the one place where JSON from a client is decoded."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from ..inputs.printable import error_line
from .errors import bad_request

T = TypeVar("T")


def decode(body: bytes, kind: type[T]) -> T:
    """Decode a body as a struct of `kind`. Raises ApiError, status 400, with the path of the field at fault."""
    try:
        return msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except msgspec.ValidationError as error:
        raise bad_request(error_line(error), _field(str(error))) from None
    except (msgspec.DecodeError, UnicodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error_line(error)}") from None


def _field(message: str) -> str | None:
    """The field that a message of msgspec ends with, as in "… - at `$.n`"."""
    _, found, path = message.rpartition("`$.")
    return path.rstrip("`").split(".")[0].split("[")[0] if found else None
