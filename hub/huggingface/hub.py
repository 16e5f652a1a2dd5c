"""The Hugging Face hub, as an implementation of `npuq.hub.hub.Hub`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Final

from huggingface_hub import constants

from ...errors import HubError
from ..hub import Located
from ..names import CommitId, HubRepoId, Revision
from ..transfer.retry import Backoff
from ..transfer.wording import OfflineError, PassingError
from .cache import CachePlace, cached_commit
from .client import Client
from .repository import HubRepository, resolve_commit
from .target import open_target
from .upload import HubUpload


class HuggingFace:
    """The hub and one of its repositories. `token` None: the ecosystem's own (HF_TOKEN, `hf auth login`)."""

    default_branch: Final = Revision(constants.DEFAULT_REVISION)

    def __init__(self, repo: str, token: str | None = None, backoff: Backoff | None = None):
        self._client = Client(repo, token, backoff)

    @property
    def repo(self) -> HubRepoId:
        return self._client.repo

    def errors(self, doing: str) -> AbstractContextManager[None]:
        return self._client.errors(doing)

    def pinned(self, revision: Revision) -> Located:
        """Locate the present commit of a revision, by the hub alone and not by the cache. Raises HubError."""
        commit = resolve_commit(self._client, revision)
        return Located(HubRepository(self._client, commit), CachePlace(self.repo, commit, revision))

    def locate(self, revision: Revision) -> Located:
        """Find a revision; where no server answers, its commit at the last fetch."""
        commit, unanswered = self._commit(revision)
        return Located(HubRepository(self._client, commit), CachePlace(self.repo, commit, revision), unanswered)

    def open_upload(self, *, private: bool | None, revision: str | None, create_pr: bool, title: str) -> HubUpload:
        return HubUpload(self._client, open_target(self._client, private, revision, create_pr, title), title)

    def _commit(self, revision: Revision) -> tuple[CommitId, HubError | None]:
        if CommitId.holds(revision):
            return CommitId(revision), None
        cached = cached_commit(self.repo, revision)
        try:
            return resolve_commit(self._client, revision, attempts=None if cached is None else 2), None
        except (PassingError, OfflineError) as error:
            # As the client does: an earlier copy is better than none.
            if cached is None:
                raise
            return cached, error
