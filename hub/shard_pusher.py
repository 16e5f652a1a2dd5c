"""Push an artifact while it is being made: each shard goes up when its bytes are final, in order, beside the work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import ArtifactError, NpuqError
from ..inputs.files import inside
from ..inputs.names import FileName, Sha256
from .client import Backoff, Hub
from .commits import Committer
from .huggingface import list_branch
from .parallel import start_threads
from .progress import Silent
from .pushing import PushSummary, default_title, push
from .remote_state import previous_files, refuse_strays
from .target import open_target
from .upload import LocalFile, upload_all


class ShardPusher:
    """Takes finished shards (`add`) while a conversion goes on; `finish` pushes what is left, the manifest last.

    A shard that cannot be sent is noted and does not stop the conversion: `finish` tries it again. Raises HubError at
    once when the repository cannot be written to.
    """

    def __init__(
        self,
        artifact: str | Path,
        repo: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        note: Callable[[str], None] = lambda text: None,
        backoff: Backoff | None = None,
    ):
        self._artifact = Path(artifact)
        self._hub = Hub(repo, token, backoff)
        self._options = {"private": private, "token": token, "backoff": backoff}
        self._note = note
        target = open_target(self._hub, private, None, False, default_title(self._artifact))
        self._committer = Committer(self._hub, target, default_title(self._artifact))
        self._shards: queue.Queue[LocalFile | None] = queue.Queue()
        self._begun = False
        self._names: set[FileName] = set()
        self._threads: list[threading.Thread] = []
        start_threads(self._run, 1, "npuq-push", self._threads)

    def add(self, name: str, sha256: str) -> None:
        """A shard of the artifact is finished."""
        path = inside(self._artifact, name, ArtifactError)
        self._shards.put(LocalFile(FileName(name), path, path.stat().st_size, Sha256(sha256)))

    def finish(self) -> PushSummary:
        """Wait for the shards that are on their way, then push everything else. Raises HubError."""
        self._shards.put(None)
        for thread in self._threads:
            thread.join()
        return push(self._artifact, self._hub.repo, **self._options)  # type: ignore[arg-type]

    def _run(self) -> None:
        while (shard := self._shards.get()) is not None:
            self._try(shard)

    def _try(self, shard: LocalFile) -> None:
        try:
            self._send(shard)
        except NpuqError as error:
            self._note(f"{shard.name} was not pushed yet: {error}")

    def _send(self, shard: LocalFile) -> None:
        repository, listing = list_branch(self._hub, self._committer.target.revision)
        self._names.add(shard.name)
        there = listing.files.get(shard.name)
        if there is not None and there.sha256 == shard.sha256:
            return
        if not self._begun:
            refuse_strays(self._hub.repo, listing, {*self._names, *previous_files(repository, listing)})
            self._committer.begin(repository, listing, self._names)
            self._begun = True
        for error in upload_all(self._committer, [shard], Silent()).values():
            raise error
