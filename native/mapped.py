"""Memory maps of files behind tensors, guarded against files that become shorter.

Reading a page behind a file's new end raises SIGBUS, which ends the process. The native library handles that signal for
these maps and maps zeros instead (`native/common/mapped.c`). `check` then raises an error: results computed from the
zeros are invalid.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from pathlib import Path

from ..errors import CheckpointError
from .library import call, library


class Map(mmap.mmap):
    """A file in memory, copy-on-write: torch wants a writable buffer, and a stray write must never reach the file."""

    start: int | None = None  # its address, if the native library watches it

    def watch(self) -> None:
        """Let the native library, where it is built, replace unreadable pages with zeros."""
        found = library()
        start = ctypes.addressof(ctypes.c_char.from_buffer(self))
        if found is not None and call(found, "watch", start, len(self)) == 0:
            self.start = start

    @property
    def is_lost(self) -> bool:
        """True where a page was unreadable, or the file is now shorter than the map."""
        if self.start is not None:
            found = library()
            if found is not None and found.npuq_is_lost(self.start):
                return True
        return self.size() < len(self)

    def __del__(self) -> None:
        if self.start is not None:
            found = library()
            if found is not None:
                found.npuq_unwatch(self.start)


class MappedFiles:
    """The maps of a checkpoint's files. Thread-safe. A map lives as long as this object or a tensor over it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: dict[Path, Map] = {}

    @property
    def watched(self) -> bool:
        """True where the native library watches every map: a shorter file cannot end the process, and `check` reports
        it."""
        return all(mapped.start is not None for mapped in self._maps.values())

    def map(self, path: Path, descriptor: int) -> Map:
        """The map of an open file, made at the first call. Raises CheckpointError for a file that cannot be mapped."""
        with self._lock:
            if path not in self._maps:
                try:
                    mapped = Map(descriptor, 0, access=mmap.ACCESS_COPY)
                except (OSError, ValueError) as error:  # ValueError: it is empty
                    raise CheckpointError(f"{path}: cannot be mapped into memory: {error}") from error
                mapped.watch()
                self._maps[path] = mapped
            return self._maps[path]

    def check(self) -> None:
        """Raise CheckpointError when a file has become shorter since it was mapped, or was unreadable."""
        for path, mapped in self._maps.items():
            if mapped.is_lost:
                raise CheckpointError(
                    f"{path}: became shorter while it was in use, or cannot be read any more; fetch it again, then "
                    "load the model again"
                )
