"""Threads for a walk: results in order, a bounded number in flight, one torch thread each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Something that applies a function to items and gives the results in their order."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]: ...


class Pool:
    """A pool of `workers` threads. Not to be used from its own threads: those take `INLINE`."""

    def __init__(self, workers: int):
        self._workers = workers
        self._executor = ThreadPoolExecutor(workers, thread_name_prefix="npuq-walk")

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
        """Wait for what is running; what has not begun is dropped."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class _Inline:
    """The same in the calling thread."""

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        return map(function, items)


INLINE = _Inline()
