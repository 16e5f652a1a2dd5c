"""The Hugging Face cache, whose files npuq and other tools share."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from huggingface_hub import constants

from ...errors import HubError
from ...inputs.files import read_bytes, read_text
from ...inputs.names import FileName, Sha256
from ..hub import Repository
from ..listing import Listing, Wanted, as_listed
from ..manifest import MANIFEST, MOST_MANIFEST_BYTES
from ..names import BlobId, CommitId, Digest, HubRepoId, Revision
from ..transfer.digests import file_holds
from ..transfer.fetch import fetch_file
from ..transfer.partial import write_whole
from .verified import VerifiedFiles


class CachePlace:
    """The snapshot of a commit in the Hugging Face cache: links to blobs, which are named by the hub's hashes."""

    def __init__(self, repo: HubRepoId, commit: CommitId, revision: Revision):
        """`revision` is the user's name of the commit."""
        self._repo = repo
        self._commit = commit
        self._revision = revision
        self._folder = _cache_folder(repo)
        self.directory = self._folder / "snapshots" / commit
        self._verified = VerifiedFiles(repo, commit)

    def manifest(self) -> bytes | None:
        return read_bytes(self._manifest, HubError, MOST_MANIFEST_BYTES) if self._is_intact(MANIFEST) else None

    def bring_manifest(self, repository: Repository, listing: Listing) -> bytes:
        self.fetch(repository, as_listed(self._repo, MANIFEST, listing), lambda count: None)
        return read_bytes(self._manifest, HubError, MOST_MANIFEST_BYTES)

    def begin(self, sealed: bytes, wanted: Sequence[Wanted]) -> list[Wanted]:
        return self.missing(wanted)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        result = [file for file in wanted if not self._is_right(file)]
        self.remember()
        return result

    def fetch(self, repository: Repository, wanted: Wanted, advance: Callable[[int], object]) -> None:
        blob = self._blob(wanted.listed or wanted.digest)
        # Another commit of the repository may have brought it.
        if file_holds(blob, wanted.size, wanted.digests):
            advance(wanted.size)
        else:
            fetch_file(repository, wanted, blob, advance)
        path = self.directory / wanted.name
        _link(blob, path)
        self._verified.add(path, wanted.digest)

    def remember(self) -> None:
        self._verified.save()

    def finish(self) -> Path:
        self._refer()
        return self.directory

    @property
    def _manifest(self) -> Path:
        return self.directory / MANIFEST

    def _is_intact(self, name: FileName) -> bool:
        """True for a file whose content has the hash that its blob is named by."""
        path = self.directory / name
        if not path.is_file():
            return False
        if not path.is_symlink():
            return True
        named = path.readlink().name
        kind = Sha256 if Sha256.holds(named) else BlobId if BlobId.holds(named) else None
        return kind is None or file_holds(path, path.stat().st_size, [kind(named)])

    def _refer(self) -> None:
        """Save the commit of a branch or a tag, so that later runs find it without the hub.

        In a read-only cache nothing is saved, and the next run asks the hub again.
        """
        if CommitId.holds(self._revision) or cached_commit(self._repo, self._revision) == self._commit:
            return
        reference = _reference(self._folder, self._revision)
        with contextlib.suppress(OSError):
            write_whole(reference, self._commit.encode())

    def _blob(self, digest: Digest) -> Path:
        return self._folder / "blobs" / digest

    def _is_right(self, wanted: Wanted) -> bool:
        path = self.directory / wanted.name
        if not path.is_file() or path.stat().st_size != wanted.size:
            return False
        if self._verified.has(path, wanted.digest):
            return True
        if not file_holds(path, wanted.size, [wanted.digest]):
            return False
        self._verified.add(path, wanted.digest)
        return True


def cached_commit(repo: HubRepoId, revision: Revision) -> CommitId | None:
    """The commit of a revision at its last fetch into this cache; None when it was never fetched."""
    if CommitId.holds(revision):
        return CommitId(revision)
    try:
        return CommitId.parse(read_text(_reference(_cache_folder(repo), revision), HubError, 100).strip(), "", HubError)
    except HubError:
        return None


def _cache_folder(repo: HubRepoId) -> Path:
    # The name of huggingface_hub's `repo_folder_name`.
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.folder}"


def _reference(folder: Path, revision: Revision) -> Path:
    return folder / "refs" / revision


def _link(blob: Path, path: Path) -> None:
    """Make `path` a link to a blob of the same cache, replacing any file there; where links are not supported, move the
    blob there, as the client does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and path.resolve() == blob.resolve():
        return
    partial = path.with_name(f".{uuid.uuid4().hex}")
    try:
        partial.symlink_to(os.path.relpath(blob, path.parent))
    except OSError:
        blob.replace(path)
        return
    partial.replace(path)
