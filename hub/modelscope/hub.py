"""ModelScope, as an implementation of `npuq.hub.hub.Hub`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final
from urllib.parse import quote

from ...errors import HubError
from ..hub import Located
from ..names import RepoId, Revision, parse_revision
from ..transfer.folder import FolderPlace, Source
from ..transfer.retry import Backoff
from .client import Client
from .repository import ScopeRepository
from .upload import ScopeUpload


class ModelScope:
    """One repository on ModelScope. `token` None: its client's own (MODELSCOPE_API_TOKEN, `modelscope login`)."""

    default_branch: Final = Revision("master")

    def __init__(self, repo: str, token: str | None = None, backoff: Backoff | None = None):
        self._client = Client(repo, token, backoff)

    @property
    def repo(self) -> RepoId:
        return self._client.repo

    def errors(self, doing: str) -> AbstractContextManager[None]:
        return self._client.errors(doing)

    def locate(self, revision: Revision) -> Located:
        """Find a branch, and the folder of the client's cache that follows it."""
        # Escaped, not replaced: ModelScope allows `--` in all of these names.
        folder = self._client.cache / "npuq" / self.repo / quote(revision, safe="")
        place = FolderPlace(folder, Source(self.repo, revision), follows=True)
        return Located(ScopeRepository(self._client, revision), place)

    def open_upload(self, *, private: bool | None, revision: str | None, create_pr: bool, title: str) -> ScopeUpload:
        """Open a push to an existing branch: the client makes no branches and no pull requests."""
        if create_pr:
            raise HubError("--create-pr is not for ModelScope: its client opens no pull requests")
        branch = parse_revision(revision, self.default_branch)
        self._client.open_or_make(private)
        return ScopeUpload(self._client, branch, title)
