"""Durable files of an output directory: written whole or not at all, never through a link, and synced.

The directory may hold foreign files. A link under one of npuq's names is replaced or refused, never followed.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from ..errors import ConversionError
from ..inputs.files import TOO_MANY_OPEN, reason

# Every small file is written here first, in npuq's own folder (artifact.py), and renamed into place.
PARTIAL_NAME: Final = "npuq/partial"

# Errors that free disk space does not mend.
_WRONG_PLACE: Final = {
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
    errno.ESPIPE,
}


def write_file(output: Path, name: str, content: bytes) -> None:
    """Write a file of the artifact `output` whole or not at all, and sync it. OSError when the disk refuses."""
    partial = output / PARTIAL_NAME
    with new_file(partial) as file:
        file.write(content)
    publish(partial, output / name)


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """Open a new file in place of any of that name; it is on stable storage at the end.

    A link of that name is removed, not followed. OSError when the disk refuses.
    """
    with suppress(FileNotFoundError):
        path.unlink()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def publish(partial: Path, target: Path) -> None:
    """Rename a synced file to `target`: readers see the whole file or none. OSError when the disk refuses."""
    partial.replace(target)
    sync_directory(target.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents where missing. OSError when the disk refuses, or for a link."""
    folder.mkdir(parents=True, exist_ok=True)
    refuse_link(folder)


def refuse_link(folder: Path) -> None:
    """Raise OSError where npuq's folder is a link: its target may be another program's directory."""
    if folder.is_symlink():
        raise OSError(errno.ELOOP, "is a link to another folder", str(folder))


def sync_directory(directory: Path) -> None:
    """Sync a directory: the names of created and renamed files reach stable storage."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked_directory(directory: Path) -> Iterator[None]:
    """Hold a directory's lock: of two conversions that start at once, one makes the journal."""
    refuse_link(directory)
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network file systems have no locks.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def write_error(path: Path, error: OSError) -> ConversionError:
    """The error for a disk that refuses, with the remedy."""
    message = f"{error.filename or path}: cannot be written: {reason(error)}"
    if error.errno in TOO_MANY_OPEN:
        return ConversionError(message)
    if error.errno in _WRONG_PLACE:
        return ConversionError(f"{message}; choose an output that can be written, or make this one so")
    return ConversionError(f"{message}; make room (or repair the disk) and run the same command: it continues")
