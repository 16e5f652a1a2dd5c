"""The commits of one push: repeated safely when their answer is lost, and marked as unfinished until the last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from huggingface_hub import CommitOperationDelete

from ..errors import HubError
from ..inputs.names import FileName
from . import faults
from .client import Hub, asked_seconds
from .huggingface import HubRepository, list_branch, resolve_commit
from .lfs import Addition
from .manifest import MANIFEST
from .names import CommitId
from .remote_state import UNFINISHED, previous_files
from .repository import Listing, RemoteFile
from .target import Target

_DESCRIPTION_UNFINISHED = "Part of a push that is not finished: npuq/manifest.json comes with the last commit."


# The hub allows 128 commits an hour to a repository.
SECONDS_BETWEEN = 60.0


class Committer:
    """Makes the commits of one push, one after another."""

    def __init__(self, hub: Hub, target: Target, title: str):
        self.hub = hub
        self.target = target
        self.title = title

    def head(self) -> CommitId:
        """The commit that the branch is at."""
        return resolve_commit(self.hub, self.target.revision)

    def begin(self, repository: HubRepository, listing: Listing, names: Iterable[str]) -> None:
        """Say that a push of files with these `names` is under way: no reader takes the repository for an artifact."""
        replaces = sorted({*previous_files(repository, listing), *names} - {UNFINISHED})
        content = json.dumps({"unfinished_push": True, "replaces": replaces}, indent=1).encode() + b"\n"
        deletions = [MANIFEST] if MANIFEST in listing.files else []
        self._commit([Addition.of(UNFINISHED, content)], deletions, finished=False)

    def commit(self, additions: Sequence[Addition]) -> None:
        """Name content that is on the hub already."""
        self._commit(additions, [], finished=False)

    def finish(self, additions: Sequence[Addition], deletions: Sequence[FileName]) -> CommitId:
        """The last commit, with the manifest among `additions`; returns its hash."""
        return self._commit(additions, [*deletions, UNFINISHED], finished=True)

    def _commit(self, additions: Sequence[Addition], deletions: Sequence[FileName], *, finished: bool) -> CommitId:
        """One commit. After a fault that may pass, what it may have done all the same is not asked for again."""
        hub, attempt = self.hub, 0
        while True:
            repository, listing = list_branch(hub, self.target.revision)
            wanted = [addition for addition in additions if not _holds(listing.files.get(addition.name), addition)]
            unwanted = [name for name in deletions if name in listing.files]
            if not wanted and not unwanted:
                return repository.commit
            attempt += 1
            try:
                return self._create(wanted, unwanted, finished)
            except faults.RAISED as error:
                if not faults.is_transient(error) or attempt >= hub.backoff.attempts:
                    raise hub.failure(f"committing to {hub.repo}", error) from None
                asked = asked_seconds(error)
            hub.backoff.wait(attempt, asked)

    def _create(self, additions: Sequence[Addition], deletions: Sequence[FileName], finished: bool) -> CommitId:
        info = self.hub.api.create_commit(
            self.hub.repo,
            [*additions, *map(CommitOperationDelete, deletions)],
            commit_message=self.title,
            commit_description=None if finished else _DESCRIPTION_UNFINISHED,
            revision=self.target.revision,
        )
        return CommitId.parse(info.oid, f"{self.hub.repo}: the commit that the hub made", HubError)


def _holds(remote: RemoteFile | None, addition: Addition) -> bool:
    if remote is None or remote.size != addition.upload_info.size:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == addition.upload_info.sha256.hex()
    with addition.as_file() as file:
        return remote.holds(file.read())
