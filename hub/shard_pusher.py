"""Push of an artifact during its conversion: each shard is sent when its bytes are final, in order, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..choices import HUBS
from ..errors import ArtifactError, NpuqError
from ..inputs.files import inside
from ..inputs.names import FileName, Sha256
from ..progress import Silent
from .hub import open_hub
from .local_files import LocalFile
from .pushing import PushSummary, default_title, push
from .remote_state import previous_files, refuse_strays, unfinished_note
from .transfer.parallel import start_threads
from .transfer.retry import Backoff


class ShardPusher:
    """A pusher of finished shards (`add`) during a conversion; `finish` pushes all other files, the manifest last.

    A failed shard is noted and does not stop the conversion: `finish` tries it again. Raises HubError at once without
    write access to the repository.
    """

    def __init__(
        self,
        artifact: str | Path,
        repo: str,
        *,
        hub: str = HUBS[0],
        private: bool | None = None,
        token: str | None = None,
        note: Callable[[str], None] = lambda text: None,
        backoff: Backoff | None = None,
    ):
        self._artifact = Path(artifact)
        self._repo = repo
        self._push_rest = partial(push, hub=hub, private=private, token=token, backoff=backoff)
        self._note = note
        self._hub = open_hub(hub, repo, token, backoff)
        title = default_title(self._artifact)
        self._upload = self._hub.open_upload(private=private, revision=None, create_pr=False, title=title)
        self._shards: queue.Queue[LocalFile | None] = queue.Queue()
        self._begun = False
        self._names: set[FileName] = set()
        self._threads: list[threading.Thread] = []
        start_threads(self._run, 1, "npuq-push", self._threads)

    def add(self, name: str, sha256: str) -> None:
        """Queue a finished shard of the artifact."""
        path = inside(self._artifact, name, ArtifactError)
        self._shards.put(LocalFile(FileName(name), path, path.stat().st_size, Sha256(sha256)))

    def finish(self) -> PushSummary:
        """Wait for queued shards, then push all other files. Raises HubError."""
        self._shards.put(None)
        for thread in self._threads:
            thread.join()
        return self._push_rest(self._artifact, self._repo)

    def _run(self) -> None:
        while (shard := self._shards.get()) is not None:
            self._try(shard)

    def _try(self, shard: LocalFile) -> None:
        try:
            with self._hub.errors(f"pushing {shard.name}"):
                self._send(shard)
        except NpuqError as error:
            self._note(f"{shard.name} was not pushed yet: {error}")

    def _send(self, shard: LocalFile) -> None:
        repository, listing = self._upload.head()
        self._names.add(shard.name)
        if shard.is_in(listing):
            return
        if not self._begun:
            names = {*self._names, *previous_files(repository, listing)}
            refuse_strays(self._repo, listing, names)
            self._upload.begin(listing, unfinished_note(names))
            self._begun = True
        for error in self._upload.send([shard], Silent()).values():
            raise error
