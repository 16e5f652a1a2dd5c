"""Which cached files were seen to have which sha256, so that loading a model again does not read all of it first.

A file counts as unchanged while its size, modification time and inode are those that were noted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from huggingface_hub import constants

_FOLDER = "npuq-verified"


class VerifiedFiles:
    """The notes on one snapshot (repository and commit)."""

    def __init__(self, repo: str, commit: str):
        self._path = Path(constants.HF_HOME) / _FOLDER / f"{repo.replace('/', '--')}--{commit}.json"
        self._notes = self._read()

    def has(self, path: Path, sha256: str) -> bool:
        """Whether this file was seen to have this hash, and is as it was."""
        return self._notes.get(str(path)) == [sha256, *_fingerprint(path)]

    def add(self, path: Path, sha256: str) -> None:
        """Note that this file has this hash."""
        self._notes[str(path)] = [sha256, *_fingerprint(path)]

    def save(self) -> None:
        """Write the notes; where that is not possible, the files are read again the next time."""
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._notes), encoding="utf-8")
            partial.replace(self._path)
        except OSError:
            return

    def _read(self) -> dict[str, list[object]]:
        try:
            notes = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return notes if isinstance(notes, dict) else {}


def _fingerprint(path: Path) -> list[int]:
    # Through the link: the cache's snapshots point to its blobs.
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]
