"""The pipeline: worker threads take jobs in turn, the calling thread watches, a syncer journals finished jobs.

Threads, not processes: torch and the file system release the GIL for all of the work, and nothing has to be copied
between them. Each worker reads, computes and writes; with several workers the three overlap.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ...errors import ConversionError
from ...formats.sources.weights import WeightSource
from ...parallel.threads import StoppedError, start_all
from ...parallel.torch_threads import single_threaded_torch
from ..plan.memory import Budget
from ..plan.plan import Job, Plan
from ..tally import Tally
from .hashes import ShardHashes
from .journal import Journal, Record
from .shards import ShardFiles
from .syncer import Syncer
from .worker import run_job
from .workspace import Workspace


@dataclass(frozen=True)
class Durability:
    """The intervals of syncs: a sync costs the disk's time, a kill costs the work since the last one.

    A disk may hold accepted bytes in its own cache, which only a sync empties: bytes not synced while workers compute
    are waited for at the end.
    """

    seconds: float = 10.0
    max_bytes: int = 128 << 20


# Called with the name and sha256 of every shard whose bytes are final, in the order of shards.
OnShard = Callable[[str, str], object]


@dataclass(frozen=True)
class _Hashed:
    shard: int
    sha256: str


@dataclass(frozen=True)
class _Ended:
    failure: BaseException | None


_Event = _Hashed | _Ended

# Seconds between looks for finished jobs: waking up for each would cost the workers time of the interpreter.
_LOOK_SECONDS = 0.1


class _Work:
    """The remaining work, handed out to workers: finished shards without a hash, then jobs in turn."""

    def __init__(self, plan: Plan, record: Record):
        self._lock = threading.Lock()
        self._jobs = iter([job for job in plan.turns if job.index not in record.jobs])
        self._to_hash = [
            number
            for number, shard in enumerate(plan.shards)
            if number not in record.hashes and all(index in record.jobs for index in shard.jobs)
        ]

    def next(self) -> Job | int | None:
        """The next job, the index of a finished shard to hash, or None at the end."""
        with self._lock:
            return self._to_hash.pop() if self._to_hash else next(self._jobs, None)


def run_plan(
    plan: Plan,
    source: WeightSource,
    files: ShardFiles,
    journal: Journal,
    budget: Budget,
    durability: Durability,
    tally: Tally,
    on_shard: OnShard | None = None,
) -> None:
    """Do every job that the journal does not have, and hash every shard; afterwards the journal has them all.

    On an early end (an error, a signal's exception in this thread), workers stop at their next chunk, and the finished
    jobs are journaled before the exception is raised again.
    """
    work, events, stop = _Work(plan, journal.record), queue.Queue[_Event](), threading.Event()
    done_jobs: deque[Job] = deque()
    syncer = Syncer(plan, files, journal, durability.seconds, durability.max_bytes)
    hashes = ShardHashes(plan, files, journal.record)

    def do(task: Job | int, workspace: Workspace) -> None:
        if isinstance(task, int):
            complete = hashes.advance(task, stop)
        else:
            done = run_job(task, source, files, workspace, stop)
            source.release(task.source)
            syncer.job_done(task.index, done.entry)
            done_jobs.append(task)
            complete = hashes.job_done(task, stop, done.written)
        for shard, sha256 in complete:
            syncer.shard_hashed(shard, sha256)
            events.put(_Hashed(shard, sha256))

    def worker() -> None:
        workspace = Workspace(budget.chunk_elements)
        failure: BaseException | None = None
        try:
            with suppress(StoppedError):
                while not stop.is_set() and (task := work.next()) is not None:
                    do(task, workspace)
        except BaseException as error:  # raised again by the calling thread
            failure = error
        events.put(_Ended(failure))

    finished: dict[int, str] = {}
    next_shard = 0

    def announce(shard: int, sha256: str) -> None:
        """Announce finished shards in order, although workers may finish two neighbours in any order."""
        nonlocal next_shard
        finished[shard] = sha256
        while next_shard in finished:
            if on_shard is not None:
                on_shard(plan.shards[next_shard].name, finished[next_shard])
            next_shard += 1

    threads = [threading.Thread(target=worker, name=f"npuq-{number}", daemon=True) for number in range(budget.workers)]
    with single_threaded_torch():
        try:
            syncer.start()
            for shard, sha256 in sorted(journal.record.hashes.items()):
                announce(shard, sha256)
            start_all(threads)
            _watch(events, done_jobs, len(threads), syncer, tally, announce)
            # They have no work left, but a thread that frees its tensors while Python exits would end in abort().
            for thread in threads:
                thread.join()
        except BaseException:
            stop.set()
            if source.checkpoint.window is not None:
                source.checkpoint.window.interrupt()
            _end(threads, syncer)
            raise
        syncer.finish()


def _watch(
    events: queue.Queue[_Event],
    done_jobs: deque[Job],
    workers: int,
    syncer: Syncer,
    tally: Tally,
    announce: Callable[[int, str], None],
) -> None:
    """Report progress until every worker has ended; raise the first failure."""
    while workers:
        try:
            event = events.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            event = None
        while done_jobs:
            tally.job_done(done_jobs.popleft())
        if isinstance(event, _Hashed):
            announce(event.shard, event.sha256)
        elif isinstance(event, _Ended):
            if event.failure is not None:
                raise event.failure
            workers -= 1
        syncer.check()


def _end(threads: list[threading.Thread], syncer: Syncer) -> None:
    for thread in threads:
        if thread.ident is not None:
            thread.join()
    try:
        syncer.finish()
    except ConversionError:
        # The first failure is the one to report; unjournaled jobs are done again.
        return
