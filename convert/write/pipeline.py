"""The pipeline: worker threads take jobs by turns, the calling thread watches, a syncer keeps the journal true.

Threads, not processes: torch and the file system release the GIL for all of the work, and nothing has to be copied
between them. Each worker reads, computes and writes; with several of them the three overlap.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import ConversionError
from ...formats.sources.weights import WeightSource
from ...parallel.threads import StoppedError, start_all
from ...parallel.torch_threads import one_torch_thread, single_threaded_torch
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
    """How often finished work is made stable: a sync costs the disk's time, a kill costs what was not synced.

    A disk that has taken the bytes may still hold them in a cache of its own, which only a sync empties: what is not
    synced while workers compute is waited for at the end.
    """

    seconds: float = 10.0
    max_bytes: int = 128 << 20


# Told the name and sha256 of every shard whose bytes are final, in the shards' order.
OnShard = Callable[[str, str], object]


@dataclass(frozen=True)
class _Hashed:
    shard: int
    sha256: str


@dataclass(frozen=True)
class _Ended:
    failure: BaseException | None


_Event = _Hashed | _Ended

# How often finished jobs are looked for: to be woken by each would cost the workers time that they want for Python.
_LOOK_SECONDS = 0.1


class _Work:
    """What is left to do, handed out to workers: finished shards that were never hashed, then jobs by turns."""

    def __init__(self, plan: Plan, record: Record):
        self._lock = threading.Lock()
        self._jobs = iter([job for job in plan.turns if job.index not in record.jobs])
        self._to_hash = [
            number
            for number, shard in enumerate(plan.shards)
            if number not in record.hashes and all(index in record.jobs for index in shard.jobs)
        ]

    def next(self) -> Job | int | None:
        """A job, the index of a finished shard to hash, or None at the end."""
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
    """Do every job that the journal does not vouch for, and hash every shard; afterwards the journal has them all.

    Whatever ends it early (an error, a signal's exception in this thread), workers stop at their next chunk and the
    finished jobs are journaled before the exception goes on.
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
        one_torch_thread()
        workspace = Workspace(budget.chunk_elements)
        try:
            while not stop.is_set() and (task := work.next()) is not None:
                do(task, workspace)
        except StoppedError:
            events.put(_Ended(None))
        except BaseException as error:  # carried to the calling thread, which raises it
            events.put(_Ended(error))
        else:
            events.put(_Ended(None))

    finished: dict[int, str] = {}
    next_shard = 0

    def told(shard: int, sha256: str) -> None:
        """Pass on finished shards in their order, whatever the order in which workers finish two neighbours."""
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
                told(shard, sha256)
            start_all(threads)
            _watch(events, done_jobs, len(threads), syncer, tally, told)
            # They have nothing left to do, but a thread that frees its tensors while Python exits would end in abort().
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
    told: Callable[[int, str], None],
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
            told(event.shard, event.sha256)
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
        # The failure that brought us here is the one to report; what was not journaled is done again.
        return
