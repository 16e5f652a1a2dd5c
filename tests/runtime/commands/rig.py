"""What tests of commands share."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

Run = Callable[..., tuple[int, str, str]]
"""Runs the command line in this process: (exit code, stdout, stderr)."""


def copy(directory: Path, to: Path) -> Path:
    return Path(shutil.copytree(directory, to / "model"))
