"""Memory that a long-lived process gives back."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from typing import Any

import pytest

from npuq.serve import memory

_HOLES = """
import os
from pathlib import Path
from npuq.serve.memory import trimmer

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

blocks = [bytes(100_000) for _ in range(1000)]  # below the size that glibc maps by itself
del blocks[::2]
held = resident()
del blocks[:-1]
last = [bytes(64)]  # above the free ones
before = resident()
trimmer()()
print(held, before, resident())
"""


def test_free_memory_goes_back() -> None:
    """Of what the allocator keeps, although nothing in use lies in it."""
    code = ["-c", _HOLES]
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, check=True, timeout=120)
    _, before, after = map(int, done.stdout.split())
    assert after < before - (20 << 20)


def test_a_c_library_without_trim_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(name: Any) -> Any:
        return object()

    monkeypatch.setattr(ctypes, "CDLL", other)
    memory.trimmer()()


def test_collections_pass_over_what_there_is() -> None:
    try:
        memory.freeze_objects()
        assert gc.get_freeze_count() > 10_000
        cycle: list[Any] = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1  # what comes later is collected
    finally:
        gc.unfreeze()
