"""Notes of verified hashes of cached files, so that loading a model again need not read all of it first.

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
    """The notes of one snapshot (repository and commit)."""

    def __init__(self, repo: HubRepoId, commit: CommitId):
        self._path = Path(constants.HF_HOME) / _FOLDER / f"{repo.folder}--{commit}.json"
        self._notes = self._read()

    def has(self, path: Path, digest: Digest) -> bool:
        """True for an unchanged file that was noted with this hash."""
        return self._notes.get(str(path)) == [digest, *_fingerprint(path)]

    def add(self, path: Path, digest: Digest) -> None:
        """Note a file's verified hash."""
        self._notes[str(path)] = [digest, *_fingerprint(path)]

    def save(self) -> None:
        """Write the notes; if that fails, the next run reads the files again."""
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
