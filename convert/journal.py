"""The journal of a conversion: which jobs are truly on disk, so that a killed run continues where it was.

A text file of JSON lines. The first says what is being converted, every later one names jobs (with their error
statistics) or shard hashes that were synced to disk before the line was written, or those that were lost since. A line
torn by a crash is ignored.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConversionError

JOURNAL_VERSION = 1


@dataclass(frozen=True)
class JobStats:
    """Sums over a whole weight: squared error of the quantized against the source values, and of those themselves."""

    squared_error: float
    squared_norm: float


@dataclass
class Record:
    """What a journal vouches for: finished jobs by index, and sha256 of finished shards."""

    jobs: dict[int, JobStats] = field(default_factory=dict)
    hashes: dict[int, str] = field(default_factory=dict)


class Journal:
    """An open journal, locked against a second conversion into the same directory."""

    def __init__(self, path: Path, descriptor: int, identity: Mapping[str, str], record: Record):
        self.path = path
        self.identity = dict(identity)
        self.record = record
        self._descriptor = descriptor
        self._read = Record(dict(record.jobs), dict(record.hashes))

    @staticmethod
    def first_line(identity: Mapping[str, str]) -> bytes:
        """The content of a new journal."""
        return _line({"npuq_conversion": JOURNAL_VERSION, "identity": dict(identity)})

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open and lock an existing journal, dropping a last line that a crash tore.

        Raises ConversionError when it is not a journal of this version, or another process holds it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            _lock(descriptor, path)
            identity, record, intact = _replay(path)
            os.ftruncate(descriptor, intact)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor, identity, record)

    def append(self, jobs: Mapping[int, JobStats], hashes: Mapping[int, str]) -> None:
        """Add finished jobs and shard hashes; on stable storage when this returns. The shards must be synced before."""
        lines = b""
        if jobs:
            # Python writes floats so that they read back exactly.
            entries = [[index, stats.squared_error, stats.squared_norm] for index, stats in jobs.items()]
            lines += _line({"jobs": entries})
        if hashes:
            lines += _line({"hashes": list(hashes.items())})
        self._write(lines)
        self.record.jobs.update(jobs)
        self.record.hashes.update(hashes)

    def settle(self) -> None:
        """Write down what was taken out of the record since it was read; on stable storage when this returns.

        To be called before any of it is made again: a new file soon looks like the one that was lost.
        """
        jobs = sorted(self._read.jobs.keys() - self.record.jobs.keys())
        hashes = sorted(self._read.hashes.keys() - self.record.hashes.keys())
        if jobs or hashes:
            self._write(_line({"lost_jobs": jobs, "lost_hashes": hashes}))

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            rest = rest[os.write(self._descriptor, rest) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close and unlock; the file stays."""
        os.close(self._descriptor)


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Meanwhile other processes wait here: of two conversions that start at once, one makes the journal."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems have no locks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConversionError(f"{path.parent.parent}: another npuq is converting into it right now") from None
    except OSError:
        # Some network file systems have no locks. Converting there is still possible, only not guarded.
        return


def _replay(path: Path) -> tuple[dict[str, str], Record, int]:
    """Identity, record, and the length of the intact part."""
    content = path.read_bytes()
    lines = content.split(b"\n")[:-1]  # what follows the last newline is torn or empty
    record, intact = Record(), 0
    try:
        head = json.loads(lines[0])
        version, identity = head["npuq_conversion"], head["identity"]
    except (IndexError, KeyError, TypeError, ValueError):
        raise ConversionError(f"{path}: not a conversion journal; choose another output directory") from None
    if version != JOURNAL_VERSION:
        raise ConversionError(
            f"{path}: written by another version of npuq; finish with that version, or choose another output directory"
        )
    intact = len(lines[0]) + 1
    for line in lines[1:]:
        try:
            _apply(json.loads(line), record)
        except (KeyError, TypeError, ValueError):
            break
        intact += len(line) + 1
    return identity, record, intact


def _apply(entry: Mapping[str, Any], record: Record) -> None:
    for index, squared_error, squared_norm in entry.get("jobs", ()):
        record.jobs[int(index)] = JobStats(float(squared_error), float(squared_norm))
    for shard, digest in entry.get("hashes", ()):
        record.hashes[int(shard)] = str(digest)
    for index in entry.get("lost_jobs", ()):
        record.jobs.pop(int(index), None)
    for shard in entry.get("lost_hashes", ()):
        record.hashes.pop(int(shard), None)
