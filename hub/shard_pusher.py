"""Push an artifact while it is being made: each shard goes up when its bytes are final, in order, beside the work."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from ..errors import NpuqError
from .client import Backoff, Hub
from .commits import Committer
from .progress import Silent
from .pushing import PushSummary, default_title, push
from .remote_state import list_files, previous_files, refuse_strays
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
        self._names: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="npuq-push", daemon=True)
        self._thread.start()

    def add(self, name: str, sha256: str) -> None:
        """A shard of the artifact is finished."""
        path = self._artifact / name
        self._shards.put(LocalFile(name, path, path.stat().st_size, sha256))

    def finish(self) -> PushSummary:
        """Wait for the shards that are on their way, then push everything else. Raises HubError."""
        self._shards.put(None)
        self._thread.join()
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
        revision = self._committer.target.revision
        remote = list_files(self._hub, revision)
        self._names.add(shard.name)
        there = remote.get(shard.name)
        if there is not None and there.sha256 == shard.sha256:
            return
        if not self._begun:
            refuse_strays(self._hub.repo, remote, {*self._names, *previous_files(self._hub, remote, revision)})
            self._committer.begin(remote, self._names)
            self._begun = True
        for error in upload_all(self._committer, [shard], Silent()).values():
            raise error
