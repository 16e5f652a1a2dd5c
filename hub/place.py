"""Where pulled files go: the Hugging Face cache, shared with every other tool, or a folder of the user's."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Collection, Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from huggingface_hub import constants

from ..errors import HubError
from ..inputs.files import inside, read_bytes, read_text
from ..inputs.json_text import parse_object
from ..inputs.names import FileName, Sha256
from ..inputs.printable import printable
from ..quant.artifact import OWN_FOLDER
from .digests import content_digest, file_holds
from .fetch import Wanted, fetch_file
from .manifest import MANIFEST, MOST_MANIFEST_BYTES, listed_names
from .names import BlobId, CommitId, Digest, HubRepoId, RepoId, Revision
from .partial import PARTIAL_SUFFIX, write_whole
from .repository import Repository
from .verified import VerifiedFiles

# What a folder has from the beginning of a pull to its end.
_PULLING = FileName(f"{OWN_FOLDER}/pulling.json")


class Place(Protocol):
    """A directory that files of one revision are fetched into."""

    directory: Path

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Those files that are not there with the right content."""

    def fetch(self, repository: Repository, wanted: Wanted, advance: Callable[[int], object]) -> None:
        """Fetch one file and check it; thread-safe. HubError when it is not what it must be."""

    def remember(self) -> None:
        """Note what was checked, for the next time."""

    def finish(self) -> Path:
        """Everything is there: the manifest too, and the directory is an artifact."""


class CachePlace:
    """The snapshot of a commit in the Hugging Face cache: links to contents, which are named by the hub's hashes."""

    def __init__(self, repo: HubRepoId, commit: CommitId):
        self._repo = repo
        self._commit = commit
        self._folder = _cache_folder(repo)
        self.directory = self._folder / "snapshots" / commit
        self._verified = VerifiedFiles(repo, commit)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        result = [file for file in wanted if not self._is_right(file)]
        self.remember()
        return result

    def fetch(self, repository: Repository, wanted: Wanted, advance: Callable[[int], object]) -> None:
        blob = self._blob(wanted.listed or wanted.digest)
        # Another commit of the repository may have brought it.
        if all(file_holds(blob, wanted.size, digest) for digest in wanted.digests):
            advance(wanted.size)
        else:
            fetch_file(repository, wanted, blob, advance)
        path = self.directory / wanted.name
        _link(blob, path)
        self._verified.add(path, wanted.digest)

    def remember(self) -> None:
        self._verified.save()

    def finish(self) -> Path:
        return self.directory

    def is_intact(self, name: FileName) -> bool:
        """Whether a file is there, and what its name in the cache says."""
        path = self.directory / name
        if not path.is_file():
            return False
        if not path.is_symlink():
            return True
        named = path.readlink().name
        kind = Sha256 if Sha256.holds(named) else BlobId if BlobId.holds(named) else None
        return kind is None or file_holds(path, path.stat().st_size, kind(named))

    def refer(self, revision: Revision) -> None:
        """Note which commit a branch or a tag meant, so that it is found without the hub.

        Where that cannot be written (a cache that others share), the hub is asked again the next time.
        """
        if CommitId.holds(revision) or cached_commit(self._repo, revision) == self._commit:
            return
        reference = _reference(self._folder, revision)
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
        if not file_holds(path, wanted.size, wanted.digest):
            return False
        self._verified.add(path, wanted.digest)
        return True


def cached_commit(repo: HubRepoId, revision: Revision) -> CommitId | None:
    """The commit that a revision meant when it was last fetched here; None when it never was."""
    if CommitId.holds(revision):
        return CommitId(revision)
    try:
        return CommitId.parse(read_text(_reference(_cache_folder(repo), revision), HubError, 100).strip(), "", HubError)
    except HubError:
        return None


def _cache_folder(repo: HubRepoId) -> Path:
    # As `repo_folder_name` of huggingface_hub has it.
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.folder}"


def _reference(folder: Path, revision: Revision) -> Path:
    return folder / "refs" / revision


def _link(blob: Path, path: Path) -> None:
    """Make `path` a link to a content of the same cache, whatever it was; where links are not to be had, the content
    moves there, as the client does it."""
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


@dataclass(frozen=True)
class Source:
    """Where a folder's artifact comes from."""

    repo: RepoId
    revision: Revision


class FolderPlace:
    """A folder of the user's own. Only files that the artifact has are written, and none other is touched.

    `sealed` is the manifest of the artifact that comes from `source`, `names` are the files that it lists. While it
    comes, `npuq/pulling.json` says what, so that no other artifact is mixed with it: another is refused, and what an
    earlier state of the same branch left goes away. With `follows`, for a folder of npuq's own, a finished artifact
    gives way too.
    """

    def __init__(
        self, directory: Path, source: Source, sealed: bytes, names: Collection[FileName], *, follows: bool = False
    ):
        self.directory = directory
        self._source = source
        self._sealed = sealed
        self._names = frozenset(names)
        self._stale = self._claim(follows)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        result = []
        for file in wanted:
            self._check_parent(self.directory / file.name)
            if not file_holds(self.directory / file.name, file.size, file.digest):
                result.append(file)
        return result

    def fetch(self, repository: Repository, wanted: Wanted, advance: Callable[[int], object]) -> None:
        fetch_file(repository, wanted, self.directory / wanted.name, advance)

    def remember(self) -> None:
        return

    def finish(self) -> Path:
        for name in self._stale:
            path = self.directory / name
            self._check_parent(path)
            for each in (path, path.with_name(path.name + PARTIAL_SUFFIX)):
                with contextlib.suppress(FileNotFoundError):
                    each.unlink()
        write_whole(self.directory / MANIFEST, self._sealed)
        (self.directory / _PULLING).unlink(missing_ok=True)
        return self.directory

    def _claim(self, follows: bool) -> frozenset[FileName]:
        """npuq writes into a directory that it made or found empty, and knows it again by its own folder. Returns the
        files there that another state of the branch left."""
        own, held = self.directory / OWN_FOLDER, self.directory / MANIFEST
        if self.directory.exists() and not self.directory.is_dir():
            raise HubError(f"{self.directory}: exists and is not a directory; choose another")
        if self.directory.exists() and not own.is_dir() and any(self.directory.iterdir()):
            raise HubError(f"{self.directory}: is not empty and holds no artifact of npuq's; choose another directory")
        self._check_parent(held)
        left = self._begun(follows)
        if held.exists():
            if file_holds(held, len(self._sealed), content_digest(self._sealed, Sha256)):
                if not left:
                    return left
            elif not follows:
                raise HubError(
                    f"{self.directory}: holds another artifact, or another revision; choose another directory"
                )
            else:
                left |= set(listed_names(read_bytes(held, HubError, MOST_MANIFEST_BYTES), "files")) - self._names
        else:
            self._refuse_strays(left)
        names = sorted({*self._names, *left})
        note = {"repository": self._source.repo, "revision": self._source.revision, "files": names}
        write_whole(self.directory / _PULLING, json.dumps(note, indent=1).encode() + b"\n")
        held.unlink(missing_ok=True)
        return left

    def _begun(self, follows: bool) -> frozenset[FileName]:
        """What a pull that was not finished may have left there and this artifact does not have."""
        if not os.path.lexists(self.directory / _PULLING):
            return frozenset()
        content = read_bytes(inside(self.directory, _PULLING, HubError), HubError, MOST_MANIFEST_BYTES)
        note = parse_object(content, str(self.directory / _PULLING), HubError)
        if not follows and (note.get("repository"), note.get("revision")) != (self._source.repo, self._source.revision):
            raise HubError(
                f"{self.directory}: holds a part of another artifact, or of another revision; choose another "
                "directory, or remove this one"
            )
        return frozenset(listed_names(content, "files")) - self._names

    def _refuse_strays(self, left: Container[str]) -> None:
        """HubError for weights that nobody knows the origin of: engines would load them too."""
        for path in self.directory.glob("*.safetensors"):
            if path.name not in self._names and path.name not in left:
                raise HubError(f"{printable(str(path))}: is not of this artifact; choose another directory")

    def _check_parent(self, path: Path) -> None:
        """HubError where a link of the directory leads out of it."""
        if not path.parent.resolve().is_relative_to(self.directory.resolve()):
            raise HubError(f"{path.parent}: a link out of the directory; refusing to write there")
