"""Work on several items at once, results in the items' order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from ...parallel.threads import held_signals
from .wording import no_thread

Item = TypeVar("Item")
Result = TypeVar("Result")


def start_threads(run: Callable[[], None], count: int, name: str, threads: list[threading.Thread]) -> None:
    """Start up to `count` daemon threads that call `run`, as many as the system allows, and append them to `threads`.

    Daemons, so that an interrupted caller need not wait for a transfer. HubError where the system allows none.
    """
    with held_signals():
        for number in range(count):
            thread = threading.Thread(target=run, name=f"{name}-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # can't start new thread
                if threads:
                    return
                raise no_thread(error) from None
            threads.append(thread)


def in_order(
    items: Sequence[Item], work: Callable[[Item], Result], workers: int
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield each item with the result or exception of `work`, in order; up to `workers` items are in work at a time.

    Closing the iterator starts no further item. Raises HubError where no thread can be started.
    """
    done: dict[int, Result | Exception] = {}
    changed, stop = threading.Condition(), threading.Event()
    numbers = iter(range(len(items)))

    def run() -> None:
        while True:
            with changed:
                number = next(numbers, None)
            if number is None or stop.is_set():
                return
            result: Result | Exception
            try:
                result = work(items[number])
            except Exception as error:  # handed to the caller, in the item's turn
                result = error
            with changed:
                done[number] = result
                changed.notify_all()

    try:
        start_threads(run, min(workers, len(items)), "npuq-transfer", [])
        for number, item in enumerate(items):
            with changed:
                while number not in done:
                    changed.wait()
                result = done.pop(number)
            yield item, result
    finally:
        stop.set()
