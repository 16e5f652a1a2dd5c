"""The machine and the versions that a benchmark ran on, as part of its JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from npuq.native.library import levels

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("npuq", "torch", "numpy", "transformers", "tokenizers")


def as_json(figures: Mapping[str, Any]) -> str:
    """JSON of figures, with the machine in front."""
    return json.dumps({"machine": describe(), **figures}, indent=2, default=str)


def describe() -> dict[str, Any]:
    """Describe the machine now. clock_mhz: the fastest core's clock at this moment, None where Linux does not tell it.
    load: processes that ran or waited for a core in the last minute. memory_bytes: installed."""
    cores = sorted(os.sched_getaffinity(0))
    return {
        "processor": _processor("model name") or platform.machine(),
        "family": " ".join(f"{name} {value}" for name in ("cpu family", "model") if (value := _processor(name))),
        "levels": list(levels()),
        "cores": len(cores),
        "clock_mhz": _clock(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **_versions()},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def in_words(machine: Mapping[str, Any]) -> str:
    """Name a machine, with its read bandwidth, for the caption of a table."""
    clock = f"{machine['clock_mhz'] / 1e3:.1f} GHz seen, " if machine["clock_mhz"] else ""
    level = machine["levels"][-1] if machine["levels"] else "no native kernels"
    family = f" ({machine['family']})" if machine["family"] else ""
    read = machine["read_bytes_per_s"] / 1e9
    return (
        f"{machine['processor']}{family}, {machine['cores']} cores, {clock}{level}, read bandwidth {read:.1f} GB/s, "
        f"load {machine['load']:.1f}; torch {machine['versions']['torch']}; "
        f"commit {machine['commit']}, {machine['date'][:10]}"
    )


def _processor(key: str) -> str:
    """The first value of a key of /proc/cpuinfo."""
    for line in _cpuinfo():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _clock() -> float | None:
    found = [float(line.partition(":")[2]) for line in _cpuinfo() if line.startswith("cpu MHz")]
    return max(found) if found else None


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _versions() -> dict[str, str]:
    return {package: version(package) for package in PACKAGES if find_spec(package) is not None}


def _commit() -> str:
    """The checkout's commit, with a + behind it where files differ from it; "unknown" without git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
