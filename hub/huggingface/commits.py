"""The commits of one push, repeated safely after a lost answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from huggingface_hub import CommitOperationDelete

from ...errors import HubError
from ...inputs.names import FileName
from ..names import CommitId
from .client import Client
from .faults import of_the_client
from .lfs import Addition, expect_lfs
from .repository import list_branch
from .target import Target

_DESCRIPTION_UNFINISHED: Final = "Part of a push that is not finished: npuq/manifest.json comes with the last commit."
# The hub allows 128 commits an hour to a repository.
SECONDS_BETWEEN = 60.0


class Committer:
    """The commits of one push, one after another."""

    def __init__(self, client: Client, target: Target, title: str):
        expect_lfs()
        self.client = client
        self.target = target
        self.title = title

    def commit(
        self, additions: Sequence[Addition], deletions: Sequence[FileName] = (), *, finished: bool = False
    ) -> CommitId:
        """Add and delete files in one commit, or none where the branch has that state; returns the branch's commit.

        After a transient fault, changes that the commit made in spite of it are not requested again. Raises HubError.
        """
        return self.client.call(
            f"committing to {self.client.repo}", lambda: self._commit(additions, deletions, finished)
        )

    def _commit(self, additions: Sequence[Addition], deletions: Sequence[FileName], finished: bool) -> CommitId:
        repository, listing = list_branch(self.client, self.target.revision)
        wanted = [addition for addition in additions if not addition.is_in(listing)]
        unwanted = [name for name in deletions if name in listing.files]
        if not wanted and not unwanted:
            return repository.commit
        with of_the_client():
            info = self.client.api.create_commit(
                self.client.repo,
                [*wanted, *map(CommitOperationDelete, unwanted)],
                commit_message=self.title,
                commit_description=None if finished else _DESCRIPTION_UNFINISHED,
                revision=self.target.revision,
            )
            made = info.oid
        return CommitId.parse(made, f"{self.client.repo}: the commit that the hub made", HubError)
