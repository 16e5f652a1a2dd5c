"""Files that are mapped into memory for as long as a tensor lies in them, and what is done when one becomes shorter.

A page that a file no longer has cannot be read: the operating system sends SIGBUS, which ends the process. The native
library takes that signal for the pages of these maps and gives zeros instead (`native/common/mapped.c`); `check` then
says that what was computed is worth nothing.
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

    start: int | None = None  # where it begins, if the native library watches it

    def watch(self) -> None:
        """Have pages that cannot be read become zeros, where the native library is there to do it."""
        found = library()
        start = ctypes.addressof(ctypes.c_char.from_buffer(self))
        if found is not None and call(found, "watch", start, len(self)) == 0:
            self.start = start

    @property
    def is_lost(self) -> bool:
        """Whether a page could not be read, or some could not be now."""
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
    """The maps of a checkpoint's files. Thread-safe. A map stays for as long as this, or a tensor that lies in it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._maps: dict[Path, Map] = {}

    @property
    def watched(self) -> bool:
        """Whether no file can end the process by becoming shorter: all it takes is `check` afterwards."""
        return all(mapped.start is not None for mapped in self._maps.values())

    def map(self, path: Path, descriptor: int) -> Map:
        """The map of an open file, made when it is first asked for. Raises CheckpointError for one that has no map."""
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
        """Raise CheckpointError when a file has become shorter since it was mapped, or could not be read."""
        for path, mapped in self._maps.items():
            if mapped.is_lost:
                raise CheckpointError(
                    f"{path}: became shorter while it was in use, or cannot be read any more; fetch it again, then "
                    "load the model again"
                )
