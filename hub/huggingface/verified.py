"""Which cached files were seen to have which hash, so that loading a model again does not read all of it first.

A file counts as unchanged while its size, modification time and inode are those that were noted.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from huggingface_hub import constants

from ...errors import HubError
from ...inputs.json_text import read_object
from ..names import CommitId, Digest, HubRepoId
from ..transfer.partial import write_whole

_FOLDER = "npuq-verified"


class VerifiedFiles:
    """The notes on one snapshot (repository and commit)."""

    def __init__(self, repo: HubRepoId, commit: CommitId):
        self._path = Path(constants.HF_HOME) / _FOLDER / f"{repo.folder}--{commit}.json"
        self._notes = self._read()

    def has(self, path: Path, digest: Digest) -> bool:
        """Whether this file was seen to have this hash, and is as it was."""
        return self._notes.get(str(path)) == [digest, *_fingerprint(path)]

    def add(self, path: Path, digest: Digest) -> None:
        """Note that this file has this hash."""
        self._notes[str(path)] = [digest, *_fingerprint(path)]

    def save(self) -> None:
        """Write the notes; where that is not possible, the files are read again the next time."""
        with contextlib.suppress(OSError):
            write_whole(self._path, json.dumps(self._notes).encode())

    def _read(self) -> dict[str, object]:
        try:
            return dict(read_object(self._path, HubError))
        except HubError:
            return {}


def _fingerprint(path: Path) -> list[int]:
    # Through the link: the cache's snapshots point to its blobs.
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]
