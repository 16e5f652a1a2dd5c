"""The pipeline: worker threads take jobs in order, the calling thread watches, a syncer keeps the journal true.

Threads, not processes: torch and the file system release the GIL for all of the work, and nothing has to be copied
between them. Each worker reads, computes and writes; with several of them the three overlap.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import ConversionError
from ..quant.dialects import WeightSource
from .journal import Journal, Record
from .memory import Budget
from .output import write_error
from .plan import Job, Plan
from .progress import Progress
from .shards import ShardFiles
from .syncer import Syncer
from .worker import StoppedError, run_job

_HASH_CHUNK = 1 << 20


@dataclass(frozen=True)
class Durability:
    """How often finished work is made stable: a sync costs the disk's time, a kill costs what was not synced."""

    seconds: float = 10.0
    max_bytes: int = 2 << 30


# Told the name and sha256 of every shard whose bytes are final, in the shards' order.
OnShard = Callable[[str, str], object]


@dataclass(frozen=True)
class _Done:
    job: Job


@dataclass(frozen=True)
class _Hashed:
    shard: int
    sha256: str


@dataclass(frozen=True)
class _Ended:
    failure: BaseException | None


_Event = _Done | _Hashed | _Ended


class _Work:
    """What is left to do, handed out to workers: shards to hash before jobs, jobs in plan order."""

    def __init__(self, plan: Plan, record: Record):
        self._lock = threading.Lock()
        self._jobs = iter([job for job in plan.jobs if job.index not in record.jobs])
        self._left = [sum(index not in record.jobs for index in shard.jobs) for shard in plan.shards]
        self._to_hash = [shard for shard, left in enumerate(self._left) if left == 0 and shard not in record.hashes]

    def next(self) -> Job | int | None:
        """A job, the index of a finished shard to hash, or None at the end."""
        with self._lock:
            return self._to_hash.pop() if self._to_hash else next(self._jobs, None)

    def job_done(self, job: Job) -> None:
        with self._lock:
            self._left[job.shard] -= 1
            if self._left[job.shard] == 0:
                self._to_hash.append(job.shard)


def run_plan(
    plan: Plan,
    source: WeightSource,
    files: ShardFiles,
    journal: Journal,
    budget: Budget,
    durability: Durability,
    progress: Progress,
    on_shard: OnShard | None = None,
) -> None:
    """Do every job that the journal does not vouch for, and hash every shard; afterwards the journal has them all.

    Whatever ends it early (an error, a signal's exception in this thread), workers stop at their next chunk and the
    finished jobs are journaled before the exception goes on.
    """
    try:
        journal.settle()
    except OSError as error:
        raise write_error(journal.path, error) from error
    work, events, stop = _Work(plan, journal.record), queue.Queue[_Event](), threading.Event()
    syncer = Syncer(plan, files, journal, durability.seconds, durability.max_bytes)

    def worker() -> None:
        try:
            while not stop.is_set() and (task := work.next()) is not None:
                if isinstance(task, int):
                    sha256 = file_sha256(files.path(task))
                    syncer.shard_hashed(task, sha256)
                    events.put(_Hashed(task, sha256))
                    continue
                stats = run_job(task, source, files, budget.chunk_elements, stop)
                source.release(task.source)
                syncer.job_done(task.index, stats)
                work.job_done(task)
                events.put(_Done(task))
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
            for thread in threads:
                thread.start()
            _watch(events, len(threads), syncer, progress, told)
        except BaseException:
            stop.set()
            source.checkpoint.interrupt()
            _end(threads, syncer)
            raise
        syncer.finish()


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file, read in small pieces."""
    digest, buffer = hashlib.sha256(), bytearray(_HASH_CHUNK)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
    except OSError as error:
        raise ConversionError(f"{path}: cannot be read back: {error.strerror}") from error
    return digest.hexdigest()


def _watch(
    events: queue.Queue[_Event], workers: int, syncer: Syncer, progress: Progress, told: Callable[[int, str], None]
) -> None:
    """Report progress until every worker has ended; raise the first failure."""
    while workers:
        event = events.get()
        if isinstance(event, _Done):
            progress.advance(event.job.source_bytes, event.job.layer)
        elif isinstance(event, _Hashed):
            told(event.shard, event.sha256)
        elif event.failure is not None:
            raise event.failure
        else:
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


@contextmanager
def single_threaded_torch() -> Iterator[None]:
    """One torch thread a worker: the workers are the parallelism."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
