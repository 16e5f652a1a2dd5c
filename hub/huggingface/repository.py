"""A repository on the Hugging Face hub at one commit: its listing, checked, and its files by ranges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from huggingface_hub import constants

from ...errors import HubError, NpuqError
from ...inputs.names import FileName, Sha256
from ..hub import Answer
from ..listing import Listing, parse_listing
from ..names import BlobId, CommitId, Digest, HubRepoId, Revision, byte_count
from ..transfer.retry import Backoff
from .client import Client


class HubRepository:
    """A repository at a commit, as an implementation of `npuq.hub.hub.Repository`."""

    raised = Client.raised

    def __init__(self, client: Client, commit: CommitId):
        self.client = client
        self.commit = commit

    @property
    def repo(self) -> HubRepoId:
        return self.client.repo

    @property
    def backoff(self) -> Backoff:
        return self.client.backoff

    def listing(self) -> Listing:
        return self.client.call(
            f"listing {self.repo}", lambda: parse_listing(self.client.tree(self.commit), self.repo, _entry)
        )

    @contextmanager
    def open(self, name: FileName, start: int, end: int) -> Iterator[Answer]:
        headers = {"Range": f"bytes={start}-{end - 1}"}
        url, seconds = self.client.file_url(name, self.commit), constants.HF_HUB_DOWNLOAD_TIMEOUT
        with self.client.stream(url, headers, seconds=seconds) as answer:
            yield answer

    def is_transient(self, error: BaseException) -> bool:
        return self.client.is_transient(error)

    def retry_after(self, error: BaseException) -> float:
        return self.client.retry_after(error)

    def failure(self, doing: str, error: Exception) -> NpuqError:
        return self.client.failure(doing, error)


def resolve_commit(client: Client, revision: Revision, attempts: int | None = None) -> CommitId:
    """The present commit of a revision of the repository. Raises HubError."""
    return client.call(f"asking {client.repo}", lambda: client.commit_of(revision), attempts)


def list_branch(client: Client, branch: Revision) -> tuple[HubRepository, Listing]:
    """The repository at a branch's present commit, and its listing."""
    repository = HubRepository(client, resolve_commit(client, branch))
    return repository, repository.listing()


def _entry(entry: Any, where: str) -> tuple[Any, int, Digest | None] | None:
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
