"""Bytes of one file on a hub, by range requests: resumed inside the file, and never more than the hub lists."""

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

# A hub that gives a few bytes a request would else be asked millions of times.
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
    """Append bytes [start, end) of a file of `size` bytes to `file`, telling `received` of each piece written.

    A fault that may pass is retried, going on after the last byte that arrived; attempts count anew whenever some
    kilobytes arrived. An answer that is longer than the file is listed, or of another file, is refused: HubError.
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
        if position == end:  # whatever became of the connection then
            return
        retries.wait_after(error, progressed=position >= before + _PROGRESS_BYTES)


def _write(file: IO[bytes], piece: bytes) -> None:
    """All of the piece: an unbuffered file may take less of it at a time."""
    left = memoryview(piece)
    while left:
        left = left[file.write(left) :]


def read_whole(repository: Repository, name: FileName, file: RemoteFile, most: int) -> bytes:
    """The content of a small file, checked against the hub's hash where it tells one; nothing is kept. HubError."""
    if file.size > most:
        raise HubError(f"{repository.repo}: {name} has {file.size} bytes; npuq reads {most} of such a file")
    for _ in range(2):
        content = BytesIO()
        fetch_range(repository, name, file.size, 0, file.size, content)
        if file.digest is None or file.holds(content.getvalue()):
            return content.getvalue()
    raise mismatch(repository, name)


def mismatch(repository: Repository, name: str, what: str = "hash") -> HubError:
    """The error for a file whose hash or size is not what the manifest says, or the hub's own listing."""
    return HubError(
        f"{repository.repo}: {name} is not what the manifest promises or the hub lists (its {what} differs); the "
        "repository holds a damaged or unfinished push: ask its owner to push again, or give another --revision"
    )


def _wanted(answer: Answer, where: str, size: int, start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) of a file of `size` bytes out of an answer, of its body as little as that takes."""
    if answer.is_compressed:
        raise HubError(f"{where}: the hub sends it compressed, which it was asked not to")
    if answer.status == 200:
        # A server that ignores ranges sends the whole file: what was not asked for passes by.
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
        # Not in the hub's words: they may hold anything, what it was sent included.
        place = "an unknown place" if match is None else f"bytes from {match[1]}"
        raise HubError(f"{where}: asked for bytes from {start}, the hub answered {answer.status} with {place}")
    if int(match[2]) >= end or (match[3] != "*" and int(match[3]) != size):
        raise _longer(where, size)


def _longer(where: str, size: int) -> HubError:
    return HubError(f"{where}: the hub sends more than the {size} bytes that it lists, or another file; refusing it")
