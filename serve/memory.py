"""Memory of a process that runs for weeks: what the collector and the allocator would keep goes back.

A process that has loaded a model holds some 200,000 objects, and Python collects cycles only once a quarter as many
new ones survive: garbage of hours. glibc keeps what threads free in arenas of their own, which grow with each unlucky
order of large temporaries. Neither is a leak, and both look like one.
A step's temporaries come from the arena of the engine's thread. Under load they are taken again as soon as they were
given back: the memory of a server is read while it rests.
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


def give_back() -> None:
    """Collect garbage, and give free memory back to the system where the C library can (`malloc_trim`)."""
    gc.collect()  # each closed connection is a cycle; what is frozen costs no time
    if _trim is not None:
        _trim(0)  # the call lets other threads run


def _found_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim


_trim: Final = _found_trim()
