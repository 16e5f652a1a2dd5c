"""Fetching of one file: continues a partial one, and gives a file its name only when it is whole and checked."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ...errors import HubError
from ..hub import Repository
from ..listing import Wanted
from .digests import Check, file_holds
from .download import fetch_range, mismatch
from .partial import PARTIAL_SUFFIX

_CHUNK = 1 << 20


def fetch_file(repository: Repository, wanted: Wanted, target: Path, advance: Callable[[int], object]) -> None:
    """Fetch a file to `target`, and check it against its digests before it gets that name.

    The partial file is `NAME.npuq-part` beside it, also after a kill. Wrong content is fetched once more from its
    beginning, then refused: HubError.
    """
    partial = target.with_name(target.name + PARTIAL_SUFFIX)
    partial.parent.mkdir(parents=True, exist_ok=True)
    counted = 0

    def count(length: int) -> None:
        nonlocal counted
        counted += length
        advance(length)

    with _locked(partial) as (file, waited):
        # Another pull may have brought it meanwhile.
        if waited and file_holds(target, wanted.size, wanted.digests):
            count(wanted.size)
            partial.unlink(missing_ok=True)
            return
        # An earlier pull's partial file may be of other content: it does not count as an attempt.
        for _ in range(3 if os.fstat(file.fileno()).st_size else 2):
            if _complete(repository, wanted, file, count):
                os.fsync(file.fileno())
                partial.replace(target)
                return
            file.truncate(0)
            count(-counted)
        partial.unlink(missing_ok=True)
    raise mismatch(repository, wanted.name)


def _complete(repository: Repository, wanted: Wanted, file: IO[bytes], count: Callable[[int], object]) -> bool:
    """Append the missing bytes; True where the whole file has the wanted digests."""
    check, have = Check(wanted.size, wanted.digests), 0
    file.seek(0)
    while piece := file.read(_CHUNK):
        check.update(piece)
        have += len(piece)
    if have > wanted.size:
        return False
    count(have)

    def received(piece: bytes) -> None:
        check.update(piece)
        count(len(piece))

    fetch_range(repository, wanted.name, wanted.size, have, wanted.size, file, received)
    return check.holds()


@contextmanager
def _locked(partial: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """Open the partial file for appending, locked; with True where another pull held it before."""
    waited = False
    while True:
        # Unbuffered, so that a kill loses no received byte. A link is foreign, and is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(partial, flags, 0o666), "r+b", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise HubError(f"{partial}: is not a regular file; remove it")
            try:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waited = True
                    fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                # Some network file systems have no locks: the user must not run two pulls at once there.
                yield file, waited
                return
            # During the wait the other pull may have renamed its finished file.
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                yield file, waited
                return
