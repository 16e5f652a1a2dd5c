"""One file of a repository, fetched into place: goes on where an earlier try ended, appears whole and right or not."""

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
    """Fetch a file to `target`, and check it against its digests before it appears there.

    The part that has arrived lies beside it as `NAME.npuq-part`, also after a kill. Content that turns out wrong is
    fetched once more from its beginning, then refused: HubError.
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
        # What an earlier pull left may be another content's beginning: it is no try of this one.
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
    """Append what is missing; whether the whole is right."""
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
    """The partial file, open for appending and ours alone, and whether another pull had it before."""
    waited = False
    while True:
        # Unbuffered: what a kill leaves behind is what arrived. A link there is not ours, and is not followed.
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
                # Some network file systems have no locks: two pulls at once are then the user's care.
                yield file, waited
                return
            # While we waited, the other one may have moved its finished file away from under this name.
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                yield file, waited
                return
