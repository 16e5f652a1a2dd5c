"""Checks of content against the hash of a hub or a manifest: sha256, or git's hash of a file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from ...errors import HubError
from ...inputs.files import open_file
from ...inputs.names import Sha256
from ..names import Digest

_CHUNK = 1 << 20


class Check:
    """An incremental check of content of a known size against every given digest."""

    def __init__(self, size: int, digests: Iterable[Digest]):
        self._wanted = tuple(digests)
        self._hashes = [_begin(type(digest), size) for digest in self._wanted]

    def update(self, piece: bytes) -> None:
        """Hash the next bytes of the content."""
        for digest in self._hashes:
            digest.update(piece)

    def holds(self) -> bool:
        """True where the content so far has every digest."""
        return all(digest.hexdigest() == wanted for digest, wanted in zip(self._hashes, self._wanted, strict=True))


def _begin(kind: type[Digest], size: int) -> hashlib._Hash:
    return hashlib.sha256() if kind is Sha256 else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def content_digest(content: bytes, kind: type[Digest]) -> Digest:
    """Compute the digest of this kind of a content."""
    digest = _begin(kind, len(content))
    digest.update(content)
    return kind(digest.hexdigest())


def content_holds(content: bytes, size: int, digest: Digest) -> bool:
    """True where a content has this size and digest."""
    return len(content) == size and content_digest(content, type(digest)) == digest


def file_holds(path: Path, size: int, digests: Iterable[Digest]) -> bool:
    """True where a regular file has this size and all of these digests; False without a file."""
    if not path.is_file() or path.stat().st_size != size:
        return False
    check = Check(size, digests)
    with os.fdopen(open_file(path, HubError), "rb") as file:
        while piece := file.read(_CHUNK):
            check.update(piece)
    return check.holds()
