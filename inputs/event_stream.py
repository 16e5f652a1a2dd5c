"""Server-sent events from outside, read with limits (WHATWG HTML, 9.2.6: interpreting an event stream)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Protocol

from ..errors import NpuqError

MOST_EVENT_BYTES: Final = 4 << 20
"""The limit of a line, and of an event's data."""
MOST_STREAM_BYTES: Final = 256 << 20
"""The limit of a stream: a million tokens at 250 bytes of JSON each."""


class Lines(Protocol):
    """A binary file that is read by lines."""

    def readline(self, limit: int, /) -> bytes:
        """The next line with its end, at most `limit` bytes; empty at the end."""


def read_events(file: Lines, where: str, error: type[NpuqError]) -> Iterator[str]:
    """Yield the data of each event; `where` names the server. Comments and other fields are left out.

    Raises `error` for lines, events and streams beyond the limits, and for data that is not UTF-8. An event that the
    end of the stream cuts is dropped, as the standard says.
    """
    data: list[bytes] = []
    total = event_bytes = 0
    while line := file.readline(MOST_EVENT_BYTES + 1):
        total += len(line)
        event_bytes += len(line)
        if event_bytes > MOST_EVENT_BYTES:
            raise error(f"{where}: sends an event of more than {MOST_EVENT_BYTES} bytes")
        if total > MOST_STREAM_BYTES:
            raise error(f"{where}: sends more than {MOST_STREAM_BYTES} bytes in one answer")
        content = line.rstrip(b"\r\n")
        name, _, value = content.partition(b":")
        if name == b"data":
            data.append(value.removeprefix(b" "))
        if not content:
            event_bytes = 0
            if data:
                yield _text(data, where, error)
                data = []


def _text(data: list[bytes], where: str, error: type[NpuqError]) -> str:
    try:
        return b"\n".join(data).decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{where}: sends an event that is not UTF-8 text") from cause
