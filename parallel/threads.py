"""Starting threads so that neither an interruption nor a limit of the system leaves some that nobody knows of."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..errors import ConversionError


class StoppedError(Exception):
    """Work was abandoned because all of it is ending."""


def start_all(threads: Sequence[threading.Thread]) -> None:
    """Start threads. ConversionError where the system starts no more: those before it run."""
    started = 0
    with held_signals():
        try:
            for thread in threads:
                thread.start()
                started += 1
        except RuntimeError as error:  # can't start new thread
            raise too_few_threads(started, len(threads)) from error


def too_few_threads(started: int, wanted: int) -> ConversionError:
    """The error of a system that starts no more threads."""
    return ConversionError(
        f"the system starts only {started} of {wanted} threads; give fewer --workers, or raise its limit (ulimit -u, "
        "or a container's limit of pids)"
    )


@contextmanager
def held_signals() -> Iterator[None]:
    """Meanwhile SIGINT and SIGTERM wait, and act at the end.

    `Thread.start` that an exception leaves halfway has a thread which runs and can be neither found nor joined.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    arrived: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Not those that are ignored, and those that Python did not set and could not put back.
    held = {number: handler for number, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}
    try:
        for number in held:
            signal.signal(number, hold)
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        for arrival in arrived:
            signal.raise_signal(arrival)
