"""Durability off the workers' path: a thread that syncs finished jobs to disk and only then journals them."""

from __future__ import annotations

import threading

from ..errors import ConversionError
from .journal import JobStats, Journal
from .plan import Plan
from .shards import ShardFiles


class Syncer:
    """Collects finished jobs and shard hashes; every `interval` seconds, or `max_bytes` written, journals them.

    The order makes the journal true after a power loss: data first (fdatasync), then the line that vouches for it.
    """

    def __init__(self, plan: Plan, files: ShardFiles, journal: Journal, interval: float, max_bytes: int):
        self._plan = plan
        self._files = files
        self._journal = journal
        self._interval = interval
        self._max_bytes = max_bytes
        self._wake = threading.Condition()
        self._jobs: dict[int, JobStats] = {}
        self._hashes: dict[int, str] = {}
        self._pending_bytes = 0
        self._stop = False
        self._failure: ConversionError | None = None
        self._thread = threading.Thread(target=self._run, name="npuq-sync", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def job_done(self, index: int, stats: JobStats) -> None:
        """Queue a job whose every byte has been written."""
        with self._wake:
            self._jobs[index] = stats
            self._pending_bytes += self._plan.jobs[index].output_bytes
            if self._pending_bytes >= self._max_bytes:
                self._wake.notify()

    def shard_hashed(self, shard: int, digest: str) -> None:
        """Queue the sha256 of a shard all of whose jobs have been queued before."""
        with self._wake:
            self._hashes[shard] = digest

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did."""
        if self._failure is not None:
            raise self._failure

    def finish(self) -> None:
        """Stop the thread and journal what is left. Raises ConversionError when that cannot be made stable."""
        with self._wake:
            self._stop = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()
        self.check()
        self._flush()
        self.check()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop or self._pending_bytes >= self._max_bytes, self._interval)
                if self._stop:
                    return
            self._flush()
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
            # What failed to sync is in no journal: the next run does it again.
            self._failure = ConversionError(
                f"{self._journal.path.parent.parent}: cannot sync the output to disk: {error.strerror}; "
                "make room (or repair the disk) and run the same command: it continues"
            )
            return
        self._files.close(hashes)
