"""The weights of a push: several files at a time go up, commits name them in order, a bad file stops no other."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import CommitOperationAdd

from ..errors import ArtifactError, HubError, NpuqError
from . import commits
from .commits import Committer
from .parallel import in_order
from .progress import TransferProgress

WORKERS = 4


@dataclass(frozen=True)
class LocalFile:
    """A file of the artifact, as the manifest has it."""

    name: str
    path: Path
    size: int
    sha256: str

    def checked_content(self) -> bytes:
        """The content, for small files. ArtifactError when it is not what the manifest has."""
        try:
            content = self.path.read_bytes()
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise self.changed()
        return content

    def changed(self) -> ArtifactError:
        """The error for content that is not the manifest's."""
        return ArtifactError(f"{self.path}: its sha256 is not the manifest's: it has changed since it was converted")


class TrackedAdd(CommitOperationAdd):
    """An addition that reports its bytes as they are read for sending."""

    advance: Callable[[int], object]

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with _TrackedFile(str(self.path_or_fileobj), self.advance) as file:
            yield file


class _TrackedFile(io.FileIO):
    """Reports how far reading has come, counting no byte twice when a request is sent again."""

    def __init__(self, path: str, advance: Callable[[int], object]):
        super().__init__(path)
        self._advance = advance
        self._furthest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        position = self.tell()
        if position > self._furthest:
            self._advance(position - self._furthest)
            self._furthest = position
        return data


def upload_all(committer: Committer, files: Sequence[LocalFile], progress: TransferProgress) -> dict[str, NpuqError]:
    """Send the content of all files and commit them in order; returns those that failed, with why.

    Commits are made once a minute at most (the hub limits commits an hour), and lag behind the content that is there
    already: content without a commit is not sent again either.
    """
    failed: dict[str, NpuqError] = {}
    waiting: list[CommitOperationAdd] = []
    last_commit = time.monotonic()
    for file, result in in_order(files, lambda file: _upload(committer, file, progress), WORKERS):
        if isinstance(result, NpuqError):
            progress.note(f"{file.name} was not sent: {result}; going on with the others")
            failed[file.name] = result
            continue
        if isinstance(result, Exception):
            raise result
        waiting.append(result)
        if time.monotonic() - last_commit >= commits.SECONDS_BETWEEN:
            committer.commit(waiting)
            waiting, last_commit = [], time.monotonic()
    if waiting:
        committer.commit(waiting)
    return failed


def _upload(committer: Committer, file: LocalFile, progress: TransferProgress) -> CommitOperationAdd:
    hub, sent = committer.hub, 0

    def advance(count: int) -> None:
        nonlocal sent
        progress.advance(min(count, file.size - sent))
        sent = min(sent + count, file.size)

    def preupload() -> CommitOperationAdd:
        operation = TrackedAdd(file.name, file.path)
        operation.advance = advance
        if operation.upload_info.sha256.hex() != file.sha256:
            raise file.changed()
        hub.api.preupload_lfs_files(
            hub.repo, [operation], revision=committer.target.revision, num_threads=1, free_memory=False
        )
        return operation

    try:
        operation = hub.call(f"sending {file.name}", preupload)
    except ValueError as error:
        # So the client reports what the store refuses for one file.
        raise HubError(f"sending {file.name}: {' '.join(str(error).split())[:200]}") from None
    # Content that the hub had already, or that the client sent by itself, was not read through us.
    advance(file.size - sent)
    return operation
