"""Downloads of one file by range requests: resumed inside the file, and never longer than the hub lists."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from io import BytesIO
from typing import IO

from ...errors import HubError
from ...inputs.names import FileName
from ..hub import Answer, Repository
from ..listing import RemoteFile
from .retry import Retries

# Else a hub that sends a few bytes a request would get millions of requests.
_PROGRESS_BYTES = 16 << 10
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19}|\*)")


def fetch_range(
    repository: Repository,
    name: FileName,
    size: int,
    start: int,
    end: int,
    file: IO[bytes],
    received: Callable[[bytes], object] = lambda piece: None,
) -> None:
    """Append bytes [start, end) of a file of `size` bytes to `file`, and call `received` with each piece written.

    After a transient fault the request continues at the last byte; attempts count anew after some kilobytes. Raises
    HubError for an answer that is longer than listed, or of another file.
    """
    position, retries = start, Retries(repository, f"{repository.repo}: {name}")
    while position < end:
        before = position
        try:
            with repository.open(name, position, end) as answer:
                for piece in _wanted(answer, f"{repository.repo}: {name}", size, position, end):
                    _write(file, piece)
                    received(piece)
                    position += len(piece)
            error: Exception = ConnectionError(f"the connection ended {end - position} bytes early")
        except HubError:
            raise
        except repository.raised as failure:
            error = failure
        if position == end:  # a later fault of the connection does not matter
            return
        retries.wait_after(error, progressed=position >= before + _PROGRESS_BYTES)


def _write(file: IO[bytes], piece: bytes) -> None:
    """Write the whole piece: an unbuffered file may write less of it at a time."""
    left = memoryview(piece)
    while left:
        left = left[file.write(left) :]


def read_whole(repository: Repository, name: FileName, file: RemoteFile, most: int) -> bytes:
    """Read a small file into memory, checked against the hub's hash where listed. Raises HubError."""
    if file.size > most:
        raise HubError(f"{repository.repo}: {name} has {file.size} bytes; npuq reads {most} of such a file")
    for _ in range(2):
        content = BytesIO()
        fetch_range(repository, name, file.size, 0, file.size, content)
        if file.digest is None or file.holds(content.getvalue()):
            return content.getvalue()
    raise mismatch(repository, name)


def mismatch(repository: Repository, name: str, what: str = "hash") -> HubError:
    """The error for a file whose hash or size differs from the manifest's or the listing's."""
    return HubError(
        f"{repository.repo}: {name} is not what the manifest promises or the hub lists (its {what} differs); the "
        "repository holds a damaged or unfinished push: ask its owner to push again, or give another --revision"
    )


def _wanted(answer: Answer, where: str, size: int, start: int, end: int) -> Iterator[bytes]:
    """Yield bytes [start, end) of a file of `size` bytes from an answer, and read no more of its body."""
    if answer.is_compressed:
        raise HubError(f"{where}: the hub sends it compressed, which it was asked not to")
    if answer.status == 200:
        # A server that ignores ranges sends the whole file: skip the bytes outside.
        position, last = 0, size
    else:
        _check_range(answer, where, size, start, end)
        position, last = start, end
    declared = answer.headers.get("Content-Length", "").strip()
    if declared.isdecimal() and int(declared[:20]) > last - position:
        raise _longer(where, size)
    for piece in answer.pieces:
        if position + len(piece) > last:
            raise _longer(where, size)
        wanted = piece[max(0, start - position) : max(0, end - position)]
        if wanted:
            yield wanted
        position += len(piece)
        if end <= position < last:
            return


def _check_range(answer: Answer, where: str, size: int, start: int, end: int) -> None:
    match = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", "").strip())
    if answer.status != 206 or match is None or int(match[1]) != start:
        # Without the hub's own text, which may contain anything, also the request's token.
        place = "an unknown place" if match is None else f"bytes from {match[1]}"
        raise HubError(f"{where}: asked for bytes from {start}, the hub answered {answer.status} with {place}")
    if int(match[2]) >= end or (match[3] != "*" and int(match[3]) != size):
        raise _longer(where, size)


def _longer(where: str, size: int) -> HubError:
    return HubError(f"{where}: the hub sends more than the {size} bytes that it lists, or another file; refusing it")
