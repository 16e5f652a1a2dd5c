"""Output shards as files of slots: header first, final size at once, then tensors at their places from any thread."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from ...formats.output_files import sync_directory
from ...inputs.files import TOO_MANY_OPEN
from ..plan.plan import Plan

Write = Callable[[int, memoryview, int], int]

# Follow no link, and do not wait for the other end of a pipe.
_FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

# A system call of Linux without a name in Python: (descriptor, offset, nbytes, flags).
_SYNC_FILE_RANGE = getattr(ctypes.CDLL(None), "sync_file_range", None)
_SYNC_FILE_RANGE_WRITE = 2
if _SYNC_FILE_RANGE is not None:
    _SYNC_FILE_RANGE.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


class ShardFiles:
    """The shards of one plan in one directory. Writing is thread-safe; slots of different jobs never overlap.

    A shard is opened when its first slot is written and stays open until its last sync: the kernel reports errors of
    its write-back to this descriptor alone.
    """

    def __init__(self, directory: Path, plan: Plan, write: Write = os.pwrite):
        self._directory = directory
        self._plan = plan
        self._write = write
        self._lock = threading.Lock()
        self._descriptors: dict[int, int] = {}
        self._new_entries = False

    @property
    def written(self) -> list[int]:
        """The shards that are open: those written to since `close`."""
        with self._lock:
            return sorted(self._descriptors)

    def path(self, shard: int) -> Path:
        return self._directory / self._plan.shards[shard].name

    def is_intact(self, shard: int) -> bool:
        """True where the file has the plan's header and size, so that its written slots can stay.

        Raises OSError where too many open files prevent the check.
        """
        planned = self._plan.shards[shard]
        try:
            with self.opened(shard) as descriptor:
                size = os.fstat(descriptor).st_size
                return size == planned.nbytes and os.pread(descriptor, len(planned.header), 0) == planned.header
        except OSError as error:
            if error.errno in TOO_MANY_OPEN:
                raise
            # Missing or unreadable: writing it reports the reason.
            return False

    @contextmanager
    def opened(self, shard: int) -> Iterator[int]:
        """Open a shard's file for reading. Raises OSError where it is missing, a link, or no regular file."""
        descriptor = os.open(self.path(shard), os.O_RDONLY | _FLAGS)
        try:
            _refuse_no_file(descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def read(self, shard: int, start: int, nbytes: int, buffer: memoryview) -> Iterator[memoryview]:
        """Read bytes [start, start + nbytes) of the file, fewer where it ends, in pieces of `buffer`.

        Raises OSError where they cannot be read.
        """
        end = start + nbytes
        with self.opened(shard) as descriptor:
            while start < end:
                count = os.preadv(descriptor, [buffer[: min(len(buffer), end - start)]], start)
                if count == 0:
                    return
                yield buffer[:count]
                start += count

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write all of `data` at an absolute offset of the shard. Raises OSError when the file system refuses."""
        _write_all(self._write, self._descriptor(shard), data, offset)

    def begin_writeback(self, shard: int, start: int, end: int) -> None:
        """Ask the kernel to begin writing these bytes back, so that `sync` waits less.

        A hint: it does nothing on a system without the call, and leaves errors to `sync`.
        """
        with self._lock:
            descriptor = self._descriptors.get(shard)  # closed: it has been synced
        if descriptor is not None and _SYNC_FILE_RANGE is not None:
            _SYNC_FILE_RANGE(descriptor, start, end - start, _SYNC_FILE_RANGE_WRITE)

    def sync(self, shards: Iterable[int]) -> None:
        """Return once every written byte of these shards is on stable storage."""
        for shard in shards:
            os.fdatasync(self._descriptor(shard))
        with self._lock:
            new_entries, self._new_entries = self._new_entries, False
        if new_entries:
            sync_directory(self._directory)

    def close(self, shards: Iterable[int] | None = None) -> None:
        """Close some shards, or all."""
        with self._lock:
            for shard in list(self._descriptors) if shards is None else shards:
                descriptor = self._descriptors.pop(shard, None)
                if descriptor is not None:
                    os.close(descriptor)

    def _descriptor(self, shard: int) -> int:
        with self._lock:
            if shard not in self._descriptors:
                self._descriptors[shard] = self._open(shard)
            return self._descriptors[shard]

    def _open(self, shard: int) -> int:
        planned = self._plan.shards[shard]
        # Never truncated on opening: the journal may vouch for slots of an earlier run.
        descriptor = os.open(self.path(shard), os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        try:
            _refuse_no_file(descriptor)
            _write_all(self._write, descriptor, memoryview(planned.header), 0)
            os.ftruncate(descriptor, planned.nbytes)
        except BaseException:
            os.close(descriptor)
            raise
        self._new_entries = True
        return descriptor


def _refuse_no_file(descriptor: int) -> None:
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        raise OSError(errno.EEXIST, "something that is no file has this name")


def _write_all(write: Write, descriptor: int, data: memoryview, offset: int) -> None:
    data = data.cast("B")
    done = 0
    while done < len(data):
        done += write(descriptor, data[done:], offset + done)
