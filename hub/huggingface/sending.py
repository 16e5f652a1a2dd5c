"""Uploads of a push's weights: several files at a time, committed in order; a failed file does not stop the others."""

from __future__ import annotations

import time
from collections.abc import Sequence

from huggingface_hub import HfApi

from ...errors import ArtifactError, NpuqError
from ...progress import Progress
from ..local_files import LocalFile
from ..transfer.parallel import in_order
from . import commits
from .commits import Committer
from .lfs import Addition

WORKERS = 4


def upload_all(committer: Committer, files: Sequence[LocalFile], progress: Progress) -> dict[str, NpuqError]:
    """Send the content of all files and commit them in order; returns the failed ones with their errors.

    Commits are at least a minute apart (the hub limits commits an hour) and lag behind the uploads. A later push does
    not send uploaded content again, committed or not.
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


def _upload(committer: Committer, file: LocalFile, progress: Progress) -> Addition:
    client, sent = committer.client, 0

    def advance(count: int) -> None:
        nonlocal sent
        progress.advance(min(count, file.size - sent))
        sent = min(sent + count, file.size)

    def preupload(api: HfApi) -> None:
        api.preupload_lfs_files(
            client.repo, [addition], revision=committer.target.revision, num_threads=1, free_memory=False
        )

    try:
        addition = Addition.read_from(file.name, file.path, advance)
    except OSError as error:
        raise ArtifactError(f"{file.path}: cannot be read: {error.strerror}") from error
    if addition.upload_info.sha256.hex() != file.sha256:
        raise file.changed()
    client.ask(f"sending {file.name}", preupload)
    # Content that the hub had was not read through `advance`.
    advance(file.size - sent)
    return addition
