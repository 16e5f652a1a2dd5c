"""A repository on ModelScope at a branch, as an implementation of `npuq.hub.hub.Repository`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

from ...errors import NpuqError
from ...inputs.names import FileName
from ..hub import Answer
from ..listing import Listing
from ..names import RepoId, Revision
from ..transfer.retry import Backoff
from .client import Client


class ScopeRepository:
    """A branch in its state at each request: the client reads no commits."""

    commit: Final = None

    def __init__(self, client: Client, branch: Revision):
        self._client = client
        self._branch = branch

    @property
    def repo(self) -> RepoId:
        return self._client.repo

    @property
    def backoff(self) -> Backoff:
        return self._client.backoff

    @property
    def raised(self) -> tuple[type[Exception], ...]:
        return self._client.raised

    def listing(self) -> Listing:
        return self._client.list_files(self._branch)

    def open(self, name: FileName, start: int, end: int) -> AbstractContextManager[Answer]:
        return self._client.open(name, self._branch, start, end)

    def is_transient(self, error: BaseException) -> bool:
        return self._client.is_transient(error)

    def retry_after(self, error: BaseException) -> float:
        return self._client.retry_after(error)

    def failure(self, doing: str, error: Exception) -> NpuqError:
        return self._client.failure(doing, error)
