"""Partial files: their names, and atomic writing of small files."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Final

PARTIAL_SUFFIX: Final = ".npuq-part"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically, making its folder where missing.

    A link at `path` is replaced, not followed. OSError where it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as file:
            file.write(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
