"""A repository on the Hugging Face hub at one commit: its listing, checked, and its files by ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from huggingface_hub import constants

from ..errors import HubError, NpuqError
from ..inputs.names import FileName, Sha256
from ..inputs.printable import printable
from . import faults
from .client import Backoff, Hub, asked_seconds
from .names import BlobId, CommitId, Digest, HubRepoId, RepoId, Revision, byte_count
from .repository import Answer, Listing, RemoteFile

# Above any repository that holds a model; a listing without end must not fill the memory.
MOST_FILES: Final = 100_000


class HubRepository:
    """A repository at a commit, as `repository.Repository` describes it."""

    def __init__(self, hub: Hub, commit: CommitId):
        self.hub = hub
        self.commit = commit

    @property
    def repo(self) -> HubRepoId:
        return self.hub.repo

    @property
    def backoff(self) -> Backoff:
        return self.hub.backoff

    @property
    def raised(self) -> tuple[type[Exception], ...]:
        return faults.RAISED

    def listing(self) -> Listing:
        """Every file of the commit."""
        return self.hub.call(
            f"listing {self.repo}", lambda: parse_listing(self.hub.tree(self.commit), self.repo, _hub_entry)
        )

    @contextmanager
    def open(self, name: FileName, start: int, end: int) -> Iterator[Answer]:
        """Ask for bytes [start, end) of a file."""
        headers = {"Range": f"bytes={start}-{end - 1}"}
        url, seconds = self.hub.file_url(name, self.commit), constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self.hub.stream(url, headers, seconds=seconds) as answer:
            yield answer

    def is_transient(self, error: BaseException) -> bool:
        return faults.is_transient(error)

    def asked_seconds(self, error: BaseException) -> float:
        return asked_seconds(error)

    def failure(self, doing: str, error: Exception) -> NpuqError:
        return self.hub.failure(doing, error)


def resolve_commit(hub: Hub, revision: Revision, attempts: int | None = None) -> CommitId:
    """The commit that a revision of the repository means. Raises HubError."""
    return hub.call(f"asking {hub.repo}", lambda: hub.commit_of(revision), attempts)


def list_branch(hub: Hub, branch: Revision) -> tuple[HubRepository, Listing]:
    """What a branch holds now, at the commit that it is at."""
    repository = HubRepository(hub, resolve_commit(hub, branch))
    return repository, repository.listing()


Entry = Callable[[Any, str], tuple[Any, int, Digest | None] | None]


def parse_listing(entries: Iterable[Any], repo: RepoId, parse: Entry) -> Listing:
    """A hub's listing; `parse` gives an entry's name, size and digest, or None for what is no file.

    Raises HubError for what is no listing. A name that no file of ours may have is set aside: others' repositories
    hold all kinds of names, and none of those is fetched.
    """
    where = f"{repo}: the hub's listing"
    files: dict[FileName, RemoteFile] = {}
    unusable: list[str] = []
    for number, entry in enumerate(entries):
        if number >= MOST_FILES:
            raise HubError(f"{where}: more than {MOST_FILES} entries; npuq reads no such repository")
        parsed = parse(entry, where)
        if parsed is None:
            continue
        name, size, digest = parsed
        if not isinstance(name, str) or not FileName.holds(name):
            unusable.append(printable(str(name)))
            continue
        if name in files:
            raise HubError(f"{where}: names {name!r} twice")
        files[FileName(name)] = RemoteFile(size, digest)
    return Listing(files, tuple(unusable))


def _hub_entry(entry: Any, where: str) -> tuple[Any, int, Digest | None] | None:
    if not isinstance(entry, dict):
        raise HubError(f"{where}: an entry is no object")
    if entry.get("type") != "file":
        return None
    lfs = entry.get("lfs")
    if lfs is None:
        digest: Digest = BlobId.parse(entry.get("oid"), where, HubError)
        return entry.get("path"), byte_count(entry.get("size"), where), digest
    if not isinstance(lfs, dict):
        raise HubError(f"{where}: an entry's lfs is no object")
    digest = Sha256.parse(lfs.get("oid"), where, HubError)
    return entry.get("path"), byte_count(lfs.get("size"), where), digest
