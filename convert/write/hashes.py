"""sha256 of shards while they are written: right behind the workers, when the bytes are still in memory.

A shard's digest follows the longest prefix of the file that no unfinished job will touch. Shards are filled in job
order, so that this prefix grows with nearly every job, and the last bytes of the last shard do not wait for the rest.
The bytes of a job are hashed from the memory that they were written from. Bytes whose memory was needed again before,
or was never kept, are read back from the file.

Two digests take hardly longer than one (`native/sha256.py`). So two neighbouring shards, which fill at the same time
(`Plan.turns`), are hashed together as far as both have come: the bytes of one that are ahead wait for the other, until
it is complete.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack

from ...errors import ConversionError
from ...native.sha256 import new_digest, two_at_once, update_two
from ..plan.plan import Job, Plan, Shard
from .jobs import read_back_error
from .journal import Record
from .shards import ShardFiles
from .workspace import Written

# Fits a core's own cache beside the data of its worker.
_CHUNK = 256 << 10


class ShardHashes:
    """Digests of some shards of a plan (by default all) that the journal does not have. Thread-safe: one thread at a
    time hashes a pair of shards, the others continue their work."""

    def __init__(self, plan: Plan, files: ShardFiles, record: Record, shards: Sequence[int] | None = None):
        def stream(number: int) -> _Stream:
            jobs = map(plan.jobs.__getitem__, plan.shards[number].jobs)
            return _Stream(number, files, plan.shards[number], [job for job in jobs if job.index not in record.jobs])

        numbers = range(len(plan.shards)) if shards is None else shards
        together = 2 if two_at_once() else 1
        self._streams: dict[int, _Stream] = {}
        self._pairs: dict[int, _Pair] = {}
        for first in range(0, len(numbers), together):
            group = {number: stream(number) for number in numbers[first : first + together]}
            pair = _Pair([each for number, each in group.items() if number not in record.hashes])
            self._streams |= group
            self._pairs |= dict.fromkeys(group, pair)

    def job_done(self, job: Job, stop: threading.Event, written: Written | None = None) -> list[tuple[int, str]]:
        """Mark every byte of a job as written, and hash as far as that allows.

        `written` has the job's bytes, where memory still holds them. Returns and raises as `advance`.
        """
        self._pairs[job.shard].job_done(self._streams[job.shard], job, written)
        return self.advance(job.shard, stop)

    def advance(self, shard: int, stop: threading.Event) -> list[tuple[int, str]]:
        """Hash the available bytes of a shard and its neighbour, unless another thread does so or `stop` is set.

        Returns the numbers and hex digests of the shards that this call completed. Raises ConversionError when a file
        cannot be read.
        """
        return self._pairs[shard].advance(stop)


class _Pair:
    """Two shards, or one, whose digests grow together."""

    def __init__(self, streams: Sequence[_Stream]):
        self._streams = streams
        self._lock = threading.Lock()
        self._busy = False

    def job_done(self, stream: _Stream, job: Job, written: Written | None) -> None:
        with self._lock:
            stream.finish(job.index, written)

    def advance(self, stop: threading.Event) -> list[tuple[int, str]]:
        complete: list[tuple[int, str]] = []
        while not stop.is_set() and (streams := self._take()):
            try:
                self._hash(streams, stop)
                complete += [(each.number, each.digest.hexdigest()) for each in streams if each.complete]
            finally:
                with self._lock:
                    self._busy = False
        return complete

    def _take(self) -> list[_Stream]:
        """The streams that the calling thread may hash now; none where another thread does, or no byte is ready."""
        with self._lock:
            if self._busy:
                return []
            streams = [stream for stream in self._streams if not stream.complete]
            if any(stream.ready == 0 for stream in streams):
                # The neighbour may take long: the end of a shard does not wait for it.
                streams = [stream for stream in streams if stream.ready and stream.all_written]
            self._busy = bool(streams)
            return streams

    def _hash(self, streams: Sequence[_Stream], stop: threading.Event) -> None:
        """Hash as many bytes of each as all have ready."""
        with self._lock:
            left = min(stream.ready for stream in streams)
        try:
            while left and not stop.is_set():
                left -= self._step(streams, left)
        finally:
            for stream in streams:
                stream.close()

    def _step(self, streams: Sequence[_Stream], most: int) -> int:
        """Hash the next bytes of each that are contiguous in memory; return their number."""
        with ExitStack() as held:
            pieces = [stream.next(most, held, self._lock) for stream in streams]
            count = min([len(piece) for piece in pieces])
            if len(streams) == 2:
                (first, second), (data, more) = streams, pieces
                update_two(first.digest, data[:count], second.digest, more[:count])
            else:
                streams[0].digest.update(pieces[0][:count])
        with self._lock:
            for stream in streams:
                stream.passed(count)
        return count


class _Stream:
    """The progress of one shard's digest, and its limit.

    `next` and `close` are for the thread that took the stream; everything else needs the pair's lock.
    """

    def __init__(self, number: int, files: ShardFiles, shard: Shard, unfinished: Sequence[Job]):
        self.number = number
        self.digest = new_digest()
        self._files = files
        self._nbytes = shard.nbytes
        self._position = 0
        self._done: set[int] = set()
        # Last first: the next unfinished job is popped from the end.
        self._waiting = sorted([(job.span[0], job.index) for job in unfinished], reverse=True)
        # The file may not be there yet.
        self._written = [Written(0, [memoryview(shard.header)])]
        self._opened = ExitStack()
        self._descriptor: int | None = None
        self._buffer = memoryview(b"")
        self._read = memoryview(b"")  # bytes read back, from `position` on

    @property
    def complete(self) -> bool:
        return self._position == self._nbytes

    @property
    def all_written(self) -> bool:
        return not self._waiting

    @property
    def ready(self) -> int:
        """The number of bytes from the position on that no job will change."""
        end = self._waiting[-1][0] if self._waiting else self._nbytes
        return max(0, end - self._position)

    def finish(self, job: int, written: Written | None) -> None:
        self._done.add(job)
        while self._waiting and self._waiting[-1][1] in self._done:
            self._done.remove(self._waiting.pop()[1])
        if written is not None:
            self._written.append(written)
            self._written.sort(key=lambda each: each.start)

    def passed(self, count: int) -> None:
        """Advance, and return the memory of jobs behind the position."""
        self._position += count
        self._read = self._read[count:]
        while self._written and self._written[0].end <= self._position:
            self._written.pop(0).take_back()
        if self.complete:
            self._buffer = memoryview(b"")

    def next(self, most: int, held: ExitStack, lock: threading.Lock) -> memoryview:
        """Between one and `most` bytes from the position on, which are valid until `held` is closed."""
        while not self._read:
            with lock:
                written = self._written[0] if self._written else None
            if written is None or written.start > self._position:
                gap = most if written is None else min(most, written.start - self._position)
                self._read = self._read_back(gap)
            elif (piece := held.enter_context(written.held(self._position))) is not None:
                return piece[:most]
            else:
                with lock:
                    self._written.remove(written)
        return self._read[:most]

    def close(self) -> None:
        self._opened.close()
        self._descriptor = None

    def _read_back(self, most: int) -> memoryview:
        path = self._files.path(self.number)
        try:
            if self._descriptor is None:
                self._descriptor = self._opened.enter_context(self._files.opened(self.number))
            if not self._buffer:
                self._buffer = memoryview(bytearray(_CHUNK))
            count = os.preadv(self._descriptor, [self._buffer[:most]], self._position)
        except OSError as error:
            raise read_back_error(path, error) from error
        if count == 0:
            raise ConversionError(f"{path}: was cut short while it was written; run the same command again")
        return self._buffer[:count]
