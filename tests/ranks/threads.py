"""Ranks as threads of one process: operators and whole models of several ranks, without starting processes.

What a process adds (gloo, mapped bytes, ends) is tested with processes. All else is the same code with another `Group`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from npuq.runtime.ranks.group import ALONE, Group

Result = TypeVar("Result")

SECONDS = 300.0


class Exchange:
    """What the ranks of one group share."""

    def __init__(self, size: int):
        self.barrier = threading.Barrier(size, timeout=SECONDS)
        self.given: list[Tensor | None] = [None] * size
        self.collectives = [0] * size
        self.lock = threading.Lock()
        self.neighbours: dict[tuple[int, int], Exchange] = {}


class ThreadGroup:
    """A `Group` whose ranks are threads. Like gloo's, its maximum loses a NaN of a later rank."""

    def __init__(self, exchange: Exchange, rank: int):
        self.exchange, self.rank, self.size = exchange, rank, len(exchange.given)

    def _all(self, tensor: Tensor) -> list[Tensor]:
        exchange = self.exchange
        exchange.collectives[self.rank] += 1
        exchange.given[self.rank] = tensor.clone()
        exchange.barrier.wait()
        found = [given.clone() for given in exchange.given if given is not None]
        exchange.barrier.wait()
        return found

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        first, *others = self._all(tensor)
        for other in others:
            first = torch.where(other > first, other, first)
        return tensor.copy_(first)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        assert not tensor.is_floating_point()
        first, *others = self._all(tensor)
        for other in others:
            first += other
        return tensor.copy_(first)

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        assert rows.shape[0] == counts[self.rank]
        return torch.cat(self._all(rows))

    def all_to_all_rows(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        assert rows.shape[0] == sum(send_counts)
        counts = self._all(torch.tensor(send_counts))
        sent = self._all(rows)
        parts = [part.split(count.tolist())[self.rank] for part, count in zip(sent, counts, strict=True)]
        assert [len(part) for part in parts] == list(receive_counts)
        return torch.cat(parts)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return tensor.copy_(self._all(tensor)[source])

    def barrier(self) -> None:
        self.exchange.barrier.wait()

    def neighbours(self, size: int) -> Group:
        if size == self.size:
            return self
        if size == 1:
            return ALONE
        with self.exchange.lock:
            exchange = self.exchange.neighbours.setdefault((size, self.rank // size), Exchange(size))
        return ThreadGroup(exchange, self.rank % size)


def on_ranks(size: int, run: Callable[[ThreadGroup], Result]) -> list[Result]:
    """Run a function on every rank of a group; the results by rank. The first error of a rank is raised."""
    exchange = Exchange(size)
    results: list[Result | None] = [None] * size
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        try:
            with torch.inference_mode():
                results[number] = run(ThreadGroup(exchange, number))
        except threading.BrokenBarrierError:
            pass  # another rank has failed
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [result for result in results if result is not None]
