"""A push to ModelScope, as an implementation of `npuq.hub.hub.Upload`.

Its client makes one commit a file, and sends it in one piece. Hence the order: the old manifest is removed first, then
come the weights one by one, the small files, and the manifest last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from ...errors import HubError, NpuqError
from ...inputs.names import FileName
from ...progress import Progress
from ..listing import Listing
from ..local_files import LocalFile
from ..manifest import MANIFEST
from ..names import CommitId, Revision
from ..remote_state import UNFINISHED
from .client import Client
from .repository import ScopeRepository


class ScopeUpload:
    """A push into an existing branch."""

    commits_together: Final = False
    pull_request: Final = None

    def __init__(self, client: Client, branch: Revision, title: str):
        self._client = client
        self._title = title
        self._sent: list[LocalFile] = []
        self._is_marked = False
        self.revision = branch

    @property
    def page(self) -> str:
        return self._client.page

    def head(self) -> tuple[ScopeRepository, Listing]:
        repository = ScopeRepository(self._client, self.revision)
        listing = repository.listing()
        self._is_marked = UNFINISHED in listing.files
        return repository, listing

    def begin(self, listing: Listing, note: bytes) -> None:
        if not listing.holds(UNFINISHED, note):
            self._client.put(UNFINISHED, note, self.revision, self._title)
        self._is_marked = True
        if MANIFEST in listing.files:
            self._client.remove([MANIFEST], self.revision, self._title)

    def send(self, files: Sequence[LocalFile], progress: Progress) -> dict[str, NpuqError]:
        """Send the weights first, then the small files, one at a time: each is a commit to the same branch."""
        failed: dict[str, NpuqError] = {}
        for file in sorted(files, key=lambda file: not file.name.endswith(".safetensors")):
            try:
                self._client.put(file.name, file.path, self.revision, self._title)
            except HubError as error:
                progress.note(f"{file.name} was not sent: {error}; going on with the others")
                failed[file.name] = error
            progress.advance(file.size)
            self._sent.append(file)
        return failed

    def finish(self, contents: Mapping[FileName, bytes], removed: Sequence[FileName]) -> CommitId | None:
        for name in sorted(contents, key=lambda name: name == MANIFEST):
            if name == MANIFEST:
                self._refuse_unlike()
            self._client.put(name, contents[name], self.revision, self._title)
        unwanted = sorted({*removed, *((UNFINISHED,) if self._is_marked else ())})
        if unwanted:
            self._client.remove(unwanted, self.revision, self._title)
        return None

    def tag(self, name: str, commit: CommitId | None) -> None:
        self._client.tag(name, self.revision)

    def publish(self) -> None:
        return

    def _refuse_unlike(self) -> None:
        """Refuse sent files whose listed hash is not the manifest's, for example after a change on disk; called before
        the manifest is sent."""
        if not self._sent:
            return
        listing = ScopeRepository(self._client, self.revision).listing()
        for file in self._sent:
            there = listing.files.get(file.name)
            if there is None or (there.size, there.digest) != (file.size, file.sha256):
                raise HubError(f"{file.path}: ModelScope lists other content than the manifest has; run `npuq verify`")
