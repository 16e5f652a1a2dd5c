"""Durability off the workers' path: a thread that syncs finished jobs to disk and only then journals them."""

from __future__ import annotations

import threading
import time

from ...errors import ConversionError
from ...formats.output_files import write_error
from ...parallel.threads import start_all
from ..plan.plan import Plan
from .journal import JobEntry, Journal
from .shards import ShardFiles

# Bytes between two write-back requests to the kernel, which would otherwise leave the writing to the sync.
_WRITEBACK_BYTES = 16 << 20


class Syncer:
    """Collects finished jobs and shard hashes; journals them every `interval` seconds, or `max_bytes` written.

    The order makes the journal true after a power loss: data first (fdatasync), then the line that vouches for it. The
    disk starts writing much earlier, while workers compute; after a sync it rests for as long as the sync took.
    """

    def __init__(self, plan: Plan, files: ShardFiles, journal: Journal, interval: float, max_bytes: int):
        self._plan = plan
        self._files = files
        self._journal = journal
        self._interval = interval
        self._max_bytes = max_bytes
        self._wake = threading.Condition()
        self._jobs: dict[int, JobEntry] = {}
        self._hashes: dict[int, str] = {}
        self._pending_bytes = 0
        self._fresh: dict[
            int, tuple[int, int]
        ] = {}  # bytes of a shard written since the last request to the kernel: [start, end)
        self._fresh_bytes = 0
        self._rested = time.monotonic()
        self._stop = False
        self._failure: ConversionError | None = None
        self._thread = threading.Thread(target=self._run, name="npuq-sync", daemon=True)

    def start(self) -> None:
        start_all([self._thread])

    def job_done(self, index: int, entry: JobEntry) -> None:
        """Queue a job whose every byte has been written."""
        job = self._plan.jobs[index]
        start, end = job.span
        with self._wake:
            self._jobs[index] = entry
            self._pending_bytes += job.output_bytes
            self._fresh_bytes += job.output_bytes
            first, last = self._fresh.get(job.shard, (start, end))
            self._fresh[job.shard] = (min(first, start), max(last, end))
            if self._wanted():
                self._wake.notify()

    def shard_hashed(self, shard: int, digest: str) -> None:
        """Queue the sha256 of a shard whose jobs have all been queued before."""
        with self._wake:
            self._hashes[shard] = digest

    def check(self) -> None:
        """Raise the error of the background thread, if any."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Stop the thread and journal the queued jobs. Raises ConversionError when they cannot be made stable."""
        with self._wake:
            self._stop = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.check()
        self._flush()
        self.check()

    def _full(self) -> bool:
        return self._pending_bytes >= self._max_bytes and time.monotonic() >= self._rested

    def _wanted(self) -> bool:
        return self._stop or self._full() or self._fresh_bytes >= _WRITEBACK_BYTES

    def _run(self) -> None:
        due = time.monotonic() + self._interval
        while True:
            with self._wake:
                self._wake.wait_for(self._wanted, max(0.0, due - time.monotonic()))
                if self._stop:
                    return
                full = self._full()
                fresh, self._fresh, self._fresh_bytes = self._fresh, {}, 0
            for shard, (start, end) in fresh.items():
                self._files.begin_writeback(shard, start, end)
            now = time.monotonic()
            if full or now >= due:
                self._flush()
                done = time.monotonic()
                self._rested = done + (done - now)
                due = done + self._interval
            if self._failure is not None:
                return

    def _flush(self) -> None:
        with self._wake:
            jobs, self._jobs = self._jobs, {}
            hashes, self._hashes = self._hashes, {}
            self._pending_bytes = 0
        if not jobs and not hashes:
            return
        try:
            self._files.sync(sorted({self._plan.jobs[index].shard for index in jobs}))
            self._journal.append(jobs, hashes)
        except OSError as error:
            # Jobs that failed to sync are in no journal: the next run does them again.
            self._failure = write_error(self._journal.path.parent.parent, error)
            return
        except ConversionError as error:  # the journal is another's by now
            self._failure = error
            return
        self._files.close(hashes)
