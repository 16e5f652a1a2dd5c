"""Limits of a child process that works on something from outside. It imports the standard library only."""

from __future__ import annotations

import resource
from pathlib import Path


def confine(memory: int, cpu_seconds: int | None = None) -> None:
    """Forbid opening and writing files, new processes and core dumps.

    Limits memory to `memory` bytes beyond those in use, and the process to so many seconds of CPU time.
    """
    used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    limits = [
        (resource.RLIMIT_AS, used + memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
        (resource.RLIMIT_NPROC, 0),
    ]
    if cpu_seconds is not None:
        limits.append((resource.RLIMIT_CPU, cpu_seconds))
    for limit, most in limits:
        hard = resource.getrlimit(limit)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (most, most))
