"""sha256 of shards while they are written: right behind the workers, when the bytes are still in memory.

A shard's digest follows the longest prefix of the file that no unfinished job will touch. Shards are laid out in job
order, so that this prefix grows with nearly every job, and the last bytes of the last shard do not wait for the rest.
A job that ends where the digest has come to is hashed from the memory that it was written from; what other jobs left is
read back.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConversionError
from .plan import Job, Plan
from .shards import ShardFiles

# Fits a core's own cache beside what it works on.
_CHUNK = 256 << 10


@dataclass(frozen=True)
class Written:
    """What a job wrote into its shard: pieces that lie one after the other from byte `start` on."""

    start: int
    pieces: tuple[memoryview, ...]


class ShardHashes:
    """Digests of all shards of a plan. Thread-safe: one thread at a time takes a shard on, the others go on working."""

    def __init__(self, plan: Plan, files: ShardFiles, finished: Container[int]):
        self._files = files
        self._shards = [
            _Prefix([job for job in map(plan.jobs.__getitem__, shard.jobs) if job.index not in finished], shard.nbytes)
            for shard in plan.shards
        ]

    def job_done(self, job: Job, stop: threading.Event, written: Written | None = None) -> str | None:
        """Say that every byte of a job is written, and hash as far as that allows. The hex digest once it is final.

        `written` is all that the job wrote, where memory still has it.
        """
        prefix = self._shards[job.shard]
        prefix.finish(job.index)
        return self.advance(job.shard, stop, written)

    def advance(self, shard: int, stop: threading.Event, written: Written | None = None) -> str | None:
        """Hash what can be hashed of a shard, unless another thread is at it or `stop` is set.

        The hex digest if this call reached the end. Raises ConversionError when the file cannot be read.
        """
        prefix = self._shards[shard]
        while (end := prefix.take()) is not None:
            try:
                if written is not None and prefix.position <= written.start < end:
                    _read_back(prefix, self._files.path(shard), written.start, stop)
                    prefix.add(written)
                else:
                    _read_back(prefix, self._files.path(shard), end, stop)
            finally:
                complete = prefix.release()
            if complete:
                return prefix.digest.hexdigest()
            if stop.is_set():
                break
        return None


class _Prefix:
    """How far the digest of one shard has come, and how far it may go."""

    def __init__(self, unfinished: list[Job], nbytes: int):
        self.digest = hashlib.sha256()
        self.position = 0
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._busy = False
        self._done: set[int] = set()
        # Last first: the next unfinished job is popped from the end.
        starts = [(job.span[0], job.index) for job in unfinished]
        self._waiting = sorted(starts, reverse=True)

    def finish(self, job: int) -> None:
        with self._lock:
            self._done.add(job)
            while self._waiting and self._waiting[-1][1] in self._done:
                self._done.remove(self._waiting.pop()[1])

    def take(self) -> int | None:
        """Where the calling thread may hash to; None when there is nothing to do or somebody does it."""
        with self._lock:
            end = self._waiting[-1][0] if self._waiting else self._nbytes
            if self._busy or self.position >= end:
                return None
            self._busy = True
            return end

    def add(self, written: Written) -> None:
        """Hash what a job wrote, if the digest has come to it."""
        if self.position != written.start:
            return
        for piece in written.pieces:
            self.digest.update(piece)
            self.position += len(piece)

    def release(self) -> bool:
        """Give the shard back; whether all of it has been hashed."""
        with self._lock:
            self._busy = False
            return self.position == self._nbytes


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in small pieces. ConversionError when it cannot be read."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise _unreadable(path, error) from error
    return digest.hexdigest()


def _read_back(prefix: _Prefix, path: Path, end: int, stop: threading.Event) -> None:
    if prefix.position == end:
        return
    buffer = memoryview(bytearray(min(_CHUNK, end - prefix.position)))
    try:
        with path.open("rb", buffering=0) as file:
            while prefix.position < end and not stop.is_set():
                wanted = min(len(buffer), end - prefix.position)
                count = os.preadv(file.fileno(), [buffer[:wanted]], prefix.position)
                if count == 0:
                    raise ConversionError(f"{path}: was cut short while it was written; run the same command again")
                prefix.digest.update(buffer[:count])
                prefix.position += count
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> ConversionError:
    return ConversionError(f"{path}: cannot be read back: {error.strerror}")
