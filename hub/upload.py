"""The weights of a push: several files at a time go up, commits name them in order, a bad file stops no other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ArtifactError, HubError, NpuqError
from ..inputs.files import read_bytes
from ..inputs.names import FileName, Sha256
from . import commits
from .commits import Committer
from .digests import content_holds
from .faults import PassingError
from .lfs import Addition
from .parallel import in_order
from .progress import TransferProgress

WORKERS = 4


@dataclass(frozen=True)
class LocalFile:
    """A file of the artifact, as the manifest has it."""

    name: FileName
    path: Path
    size: int
    sha256: Sha256

    def checked_content(self) -> bytes:
        """The content, for small files. ArtifactError when it is not what the manifest has."""
        content = read_bytes(self.path, ArtifactError, self.size)
        if not content_holds(content, self.size, self.sha256):
            raise self.changed()
        return content

    def changed(self) -> ArtifactError:
        """The error for content that is not the manifest's."""
        return ArtifactError(f"{self.path}: its sha256 is not the manifest's: it has changed since it was converted")


def upload_all(committer: Committer, files: Sequence[LocalFile], progress: TransferProgress) -> dict[str, NpuqError]:
    """Send the content of all files and commit them in order; returns those that failed, with why.

    Commits are made once a minute at most (the hub limits commits an hour), and lag behind the content that is there
    already: content without a commit is not sent again either.
    """
    failed: dict[str, NpuqError] = {}
    waiting: list[Addition] = []
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


def _upload(committer: Committer, file: LocalFile, progress: TransferProgress) -> Addition:
    hub, sent = committer.hub, 0

    def advance(count: int) -> None:
        nonlocal sent
        progress.advance(min(count, file.size - sent))
        sent = min(sent + count, file.size)

    def preupload() -> None:
        hub.api.preupload_lfs_files(
            hub.repo, [addition], revision=committer.target.revision, num_threads=1, free_memory=False
        )

    try:
        addition = Addition.read_from(file.name, file.path, advance)
    except OSError as error:
        raise ArtifactError(f"{file.path}: cannot be read: {error.strerror}") from error
    if addition.upload_info.sha256.hex() != file.sha256:
        raise file.changed()
    hub.call(f"sending {file.name}", preupload)
    # Content that the hub had already was not read through us.
    advance(file.size - sent)
    return addition


def not_sent(failed: Mapping[str, NpuqError], count: int) -> HubError:
    """The error for files of a push that were not sent. All others were, and pushing again sends only these."""
    lasting = [error for error in failed.values() if not isinstance(error, PassingError)]
    more = f" and {len(failed) - 3} more" if len(failed) > 3 else ""
    what = f"{len(failed)} of {count} files were not sent ({', '.join([*failed][:3])}{more})"
    if not lasting:
        return PassingError(f"{what}: {next(iter(failed.values()))}")
    return HubError(f"{what}: {lasting[0]}; the others are there: once that is settled, push again")
