"""The commits of one push: repeated safely when their answer is lost, and marked as unfinished until the last."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from ..quant.artifact import MANIFEST_NAME
from .client import Hub, is_transient
from .remote_state import UNFINISHED_NAME, RemoteFile, list_files, previous_files
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

    def head(self) -> str:
        """The commit that the branch is at."""
        hub = self.hub
        return str(
            hub.call(f"asking {hub.repo}", lambda: hub.api.repo_info(hub.repo, revision=self.target.revision).sha)
        )

    def begin(self, remote: Mapping[str, RemoteFile], names: Iterable[str]) -> None:
        """Say that a push of files with these `names` is under way: no reader takes the repository for an artifact."""
        replaces = sorted({*previous_files(self.hub, remote, self.target.revision), *names} - {UNFINISHED_NAME})
        content = json.dumps({"unfinished_push": True, "replaces": replaces}, indent=1).encode() + b"\n"
        deletions = [CommitOperationDelete(MANIFEST_NAME)] if MANIFEST_NAME in remote else []
        self._commit([CommitOperationAdd(UNFINISHED_NAME, content)], deletions, finished=False)

    def commit(self, additions: Sequence[CommitOperationAdd]) -> None:
        """Name content that is on the hub already."""
        self._commit(additions, [], finished=False)

    def finish(self, additions: Sequence[CommitOperationAdd], deletions: Sequence[CommitOperationDelete]) -> str:
        """The last commit, with the manifest among `additions`; returns its hash."""
        return self._commit(additions, [*deletions, CommitOperationDelete(UNFINISHED_NAME)], finished=True)

    def _commit(
        self, additions: Sequence[CommitOperationAdd], deletions: Sequence[CommitOperationDelete], *, finished: bool
    ) -> str:
        """One commit. After a fault that may pass, what it may have done all the same is not asked for again."""
        hub, attempt = self.hub, 0
        doing = f"committing to {hub.repo}"
        while True:
            there = list_files(hub, self.target.revision)
            wanted = [operation for operation in additions if not _holds(there.get(operation.path_in_repo), operation)]
            unwanted = [operation for operation in deletions if operation.path_in_repo in there]
            if not wanted and not unwanted:
                return self.head()
            attempt += 1
            try:
                return str(self._create(wanted, unwanted, finished))
            except Exception as error:
                if not is_transient(error) or attempt >= hub.backoff.attempts:
                    translated = hub.translate(doing, error)
                    if translated is None:
                        raise
                    raise translated from None
            hub.backoff.wait(attempt)

    def _create(
        self, additions: Sequence[CommitOperationAdd], deletions: Sequence[CommitOperationDelete], finished: bool
    ) -> str:
        info = self.hub.api.create_commit(
            self.hub.repo,
            [*additions, *deletions],
            commit_message=self.title,
            commit_description=None if finished else _DESCRIPTION_UNFINISHED,
            revision=self.target.revision,
        )
        return str(info.oid)


def _holds(remote: RemoteFile | None, operation: CommitOperationAdd) -> bool:
    if remote is None or remote.size != operation.upload_info.size:
        return False
    if remote.sha256 is not None:
        return remote.sha256 == operation.upload_info.sha256.hex()
    with operation.as_file() as file:
        return remote.holds(operation.upload_info.size, "", file.read())
