"""Work on several items at once, results in the items' order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    items: Sequence[Item], work: Callable[[Item], Result], workers: int
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield each item with what `work` returned or raised, in order; up to `workers` items are worked on at a time.

    The threads are daemons: a caller that is interrupted does not wait for a transfer to end. Closing the iterator
    starts no further item.
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

    for number in range(min(workers, len(items))):
        threading.Thread(target=run, name=f"npuq-transfer-{number}", daemon=True).start()
    try:
        for number, item in enumerate(items):
            with changed:
                while number not in done:
                    changed.wait()
                result = done.pop(number)
            yield item, result
    finally:
        stop.set()
