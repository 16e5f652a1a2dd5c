"""Memory of a process that runs for weeks: what the collector and the allocator would keep goes back.

A process that has loaded a model holds some 200,000 objects, and Python collects cycles only once a quarter as many
new ones survive: garbage of hours. glibc keeps what threads free in arenas of their own, which grow with each unlucky
order of large temporaries. Neither is a leak, and both look like one.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Final

TRIM_SECONDS: Final = 10.0
"""Between two returns of free memory: each takes some milliseconds, and what is needed again costs page faults."""


def freeze_objects() -> None:
    """Let collections pass over all objects that there are, for a process that keeps them to its end."""
    gc.collect()
    gc.freeze()


def trimmer() -> Callable[[], None]:
    """The function that gives free memory back to the system; with a C library that has none, one that does nothing."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return lambda: None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int

    def give_back() -> None:
        trim(0)  # the call lets other threads run

    return give_back
