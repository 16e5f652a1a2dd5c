"""Thread starts that neither an interruption nor a limit of the system leaves half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from ..errors import ConversionError


class StoppedError(Exception):
    """An end of work because the whole run ends."""


def start_all(threads: Sequence[threading.Thread]) -> None:
    """Start threads. ConversionError where the system starts no more; the threads before keep running."""
    started = 0
    with held_signals():
        try:
            for thread in threads:
                thread.start()
                started += 1
        except RuntimeError as error:  # can't start new thread
            raise too_few_threads(started, len(threads)) from error


def too_few_threads(started: int, wanted: int) -> ConversionError:
    """The error for a system that starts no more threads."""
    return ConversionError(
        f"the system starts only {started} of {wanted} threads; give fewer --workers, or raise its limit (ulimit -u, "
        "or a container's limit of pids)"
    )


@contextmanager
def held_signals() -> Iterator[None]:
    """Defer SIGINT and SIGTERM to the end of the context.

    An exception inside `Thread.start` can leave a running thread that cannot be found or joined.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return
    arrived: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Neither ignored signals, nor handlers that Python did not set and could not restore.
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
