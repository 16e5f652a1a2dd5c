"""JSON objects, one a line, each with a checksum: a line that a crash tore or a disk damaged is recognized, whatever it
contains."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any, Final

from ...errors import ConversionError
from ...inputs.json_text import parse_object

_CHECKSUM: Final = b',"crc32":"'


class DamagedLineError(ConversionError):
    """A line whose checksum does not match."""


def checked_line(content: Mapping[str, Any]) -> bytes:
    """Encode a non-empty object as a line."""
    body = json.dumps(content, separators=(",", ":")).encode()[:-1]
    return body + _CHECKSUM + _checksum(body) + b'"}\n'


def line_content(line: bytes) -> dict[str, Any]:
    """Decode a line; its newline may be missing. Raises DamagedLineError."""
    body, _, end = line.rstrip(b"\n").rpartition(_CHECKSUM)
    if end != _checksum(body) + b'"}':
        raise DamagedLineError("the checksum of a line is another")
    return parse_object(body + b"}", "a line", DamagedLineError)


def _checksum(body: bytes) -> bytes:
    return b"%08x" % zlib.crc32(body)
