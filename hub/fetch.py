"""One file of a repository, fetched into place: goes on where an earlier try ended, appears whole and right or not."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import HubError
from .client import Hub
from .download import feed, fetch_range


@dataclass(frozen=True)
class Wanted:
    """A file to fetch and what its content must be. Without `sha256` (small files of a plain checkpoint) only the size
    is known."""

    name: str
    size: int
    sha256: str | None


def fetch_file(hub: Hub, wanted: Wanted, commit: str, target: Path, advance: Callable[[int], object]) -> None:
    """Fetch a file whose sha256 is known to `target`.

    The part that has arrived lies beside it as `NAME.npuq-part`, also after a kill. Content that turns out wrong is
    fetched once more from its beginning, then refused: HubError.
    """
    partial = target.with_name(target.name + ".npuq-part")
    partial.parent.mkdir(parents=True, exist_ok=True)
    counted = 0

    def count(length: int) -> None:
        nonlocal counted
        counted += length
        advance(length)

    with _locked(partial) as file:
        for _ in range(2):
            if _complete(hub, wanted, commit, file, count):
                os.fsync(file.fileno())
                partial.replace(target)
                return
            file.truncate(0)
            count(-counted)
        partial.unlink()
    raise mismatch(hub, wanted.name)


def mismatch(hub: Hub, name: str) -> HubError:
    """The error for a file that is not what the manifest says."""
    return HubError(
        f"{hub.repo}: {name} is not what the manifest promises (its sha256 differs); the repository holds a damaged or "
        "unfinished push: ask its owner to push again, or give another --revision"
    )


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    feed(digest, path)
    return digest.hexdigest()


def _complete(hub: Hub, wanted: Wanted, commit: str, file: IO[bytes], count: Callable[[int], object]) -> bool:
    """Append what is missing; whether the whole is right."""
    digest = hashlib.sha256()
    have = feed(digest, Path(file.name))
    if have > wanted.size:
        return False
    count(have)
    file.seek(have)

    def received(piece: bytes) -> None:
        digest.update(piece)
        count(len(piece))

    fetch_range(hub, wanted.name, commit, have, wanted.size, file, received)
    file.flush()
    return digest.hexdigest() == wanted.sha256


@contextmanager
def _locked(partial: Path) -> Iterator[IO[bytes]]:
    """The partial file, open for appending and ours alone: a second pull of the same file waits."""
    while True:
        # Unbuffered: what a kill leaves behind is what arrived.
        with partial.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError:
                # Some network file systems have no locks: two pulls at once are then the user's care.
                yield file
                return
            # While we waited, the other one may have moved its finished file away from under this name.
            if partial.exists() and os.path.samestat(os.fstat(file.fileno()), partial.stat()):
                yield file
                return
