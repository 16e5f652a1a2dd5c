"""A push to the Hugging Face hub, as an implementation of `npuq.hub.hub.Upload`: three kinds of commits.

The first removes the old manifest and adds the note of an unfinished push. The next add the weights in order. The last
adds the small files and the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from huggingface_hub import HfApi

from ...errors import HubError, NpuqError
from ...inputs.names import FileName
from ...inputs.printable import printable
from ...progress import Progress
from ..listing import Listing
from ..local_files import LocalFile
from ..manifest import MANIFEST
from ..names import CommitId, Revision
from ..remote_state import UNFINISHED
from .client import Client
from .commits import Committer
from .lfs import Addition
from .repository import HubRepository, list_branch
from .sending import upload_all
from .target import Target


class HubUpload:
    """A push into a branch or a pull request."""

    commits_together: Final = True

    def __init__(self, client: Client, target: Target, title: str):
        self._client = client
        self._target = target
        self._committer = Committer(client, target, title)

    @property
    def revision(self) -> Revision:
        return self._target.revision

    @property
    def page(self) -> str:
        return self._client.page

    @property
    def pull_request(self) -> str | None:
        return self._target.pull_request

    def head(self) -> tuple[HubRepository, Listing]:
        return list_branch(self._client, self.revision)

    def begin(self, listing: Listing, note: bytes) -> None:
        self._committer.commit([Addition.of(UNFINISHED, note)], [MANIFEST])

    def send(self, files: Sequence[LocalFile], progress: Progress) -> dict[str, NpuqError]:
        return upload_all(self._committer, files, progress)

    def finish(self, contents: Mapping[FileName, bytes], removed: Sequence[FileName]) -> CommitId:
        additions = [Addition.of(name, content) for name, content in contents.items()]
        return self._committer.commit(additions, [*removed, UNFINISHED], finished=True)

    def tag(self, name: str, commit: CommitId | None) -> None:
        client, doing = self._client, f"tagging {self._client.repo} as {name!r}"

        def existing(api: HfApi) -> dict[str, str]:
            return {ref.name: ref.target_commit for ref in api.list_repo_refs(client.repo).tags}

        before = client.ask(doing, existing).get(name)
        if before == commit:
            return
        if before is not None:
            means = printable(str(before))[:12]
            raise HubError(f"{doing}: the tag exists and means {means}; the push itself is done: choose another tag")
        client.ask(doing, lambda api: api.create_tag(client.repo, tag=name, revision=commit, exist_ok=True))

    def publish(self) -> None:
        self._target.publish(self._client)
