"""Threads for work on item after item: results in order, a bounded number in flight, one torch thread each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from .threads import StoppedError, held_signals, too_few_threads
from .torch_threads import one_torch_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Something that applies a function to items and gives the results in their order."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]: ...


class Pool:
    """A pool of `workers` threads. Not to be used from its own threads: those take `inline`, which ends with it.

    ConversionError where the system starts no more threads.
    """

    def __init__(self, workers: int):
        self._workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="npuq-pool", initializer=one_torch_thread)
        self._stop = threading.Event()
        self.inline = Inline(self._stop)
        self._start()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        """Start all threads: later, an interruption or a limit would strike in the middle of the work."""
        ready = threading.Barrier(self._workers + 1)
        started = 0
        try:
            with held_signals():
                while started < self._workers:
                    self._executor.submit(_wait, ready)  # none is idle: each takes a thread of its own
                    started += 1
            ready.wait()
        except BaseException as error:
            ready.abort()
            self.close()
            if isinstance(error, RuntimeError):
                raise too_few_threads(started, self._workers) from error
            raise

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results in the order of `items`, of which at most one more than there are threads is begun ahead."""
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._executor.submit(function, item))
                if len(pending) > self._workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Wait for what is running, which stops before its next item of `inline`; what has not begun is dropped."""
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _wait(ready: threading.Barrier) -> None:
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        return


class Inline:
    """The same in the calling thread; StoppedError before the next item once `stop` is set."""

    def __init__(self, stop: threading.Event):
        self._stop = stop

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        for item in items:
            if self._stop.is_set():
                raise StoppedError
            yield function(item)
