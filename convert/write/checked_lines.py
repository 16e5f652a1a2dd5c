"""JSON objects in a line each, with a checksum: a line that a crash tore or a disk damaged is told from one that is
meant, whatever it says."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Final

from ...errors import ConversionError
from ...inputs.json_text import parse_object

_CHECKSUM: Final = b',"crc32":"'


class DamagedLineError(ConversionError):
    """A line that nobody wrote like that."""


def checked_line(content: Mapping[str, Any]) -> bytes:
    """The line of an object that is not empty."""
    body = json.dumps(content, separators=(",", ":")).encode()[:-1]
    return body + _CHECKSUM + _checksum(body) + b'"}\n'


def line_content(line: bytes) -> dict[str, Any]:
    """The object in a line, which may have lost its end of line. Raises DamagedLineError."""
    body, _, end = line.rstrip(b"\n").rpartition(_CHECKSUM)
    if end != _checksum(body) + b'"}':
        raise DamagedLineError("the checksum of a line is another")
    return parse_object(body + b"}", "a line", DamagedLineError)


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)
