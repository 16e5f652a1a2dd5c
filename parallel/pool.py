"""Threads for work on item after item: results in order, a bounded number in flight, one torch thread each."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Protocol, TypeVar

from .threads import StoppedError, held_signals, too_few_threads
from .torch_threads import one_thread_of_imported_torch

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Application of a function to items, with results in the items' order."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]: ...


class Pool:
    """A pool of `workers` threads. Its own threads must use `inline`, which stops when the pool closes.

    A function that may be the first to import torch must call `one_torch_thread`. Raises ConversionError where the
    system starts no more threads.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._executor = ThreadPoolExecutor(
            workers, thread_name_prefix="npuq-pool", initializer=one_thread_of_imported_torch
        )
        self._stop = threading.Event()
        self.inline = Inline(self._stop)
        self._start()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        """Start all threads now: later, an interruption or a limit of the system would come in the middle of the
        work."""
        ready = threading.Barrier(self.workers + 1)
        started = 0
        try:
            with held_signals():
                while started < self.workers:
                    self._executor.submit(_wait, ready)  # none is idle, so each submit starts a thread
                    started += 1
            ready.wait()
        except BaseException as error:
            ready.abort()
            self.close()
            if isinstance(error, RuntimeError):
                raise too_few_threads(started, self.workers) from error
            raise

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield results in the order of `items`; at most `workers` + 1 items are in flight."""
        return self._results(deque(), function, iter(items))

    def begin(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`map`, whose first items are in work when this returns."""
        rest = iter(items)
        first = deque(self._executor.submit(function, item) for item in islice(rest, self.workers + 1))
        return self._results(first, function, rest)

    def _results(
        self, pending: deque[Future[Result]], function: Callable[[Item], Result], items: Iterator[Item]
    ) -> Iterator[Result]:
        try:
            if len(pending) > self.workers:
                yield pending.popleft().result()
            for item in items:
                pending.append(self._executor.submit(function, item))
                if len(pending) > self.workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Drop items that have not begun, and wait for running ones; `inline` stops before its next item."""
        self._stop.set()
        self._executor.shutdown(wait=True, cancel_futures=True)


def _wait(ready: threading.Barrier) -> None:
    try:
        ready.wait()
    except threading.BrokenBarrierError:
        return


class Inline:
    """A mapper in the calling thread; raises StoppedError before the next item once `stop` is set."""

    def __init__(self, stop: threading.Event):
        self._stop = stop

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        for item in items:
            if self._stop.is_set():
                raise StoppedError
            yield function(item)
