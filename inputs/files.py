"""Files of untrusted directories: regular files inside, up to a size."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import IO, Final, NamedTuple

from ..errors import CheckpointError, NpuqError
from .printable import printable

MOST_BYTES: Final = 128 << 20
"""The limit of `read_bytes`: above any index, description or tokenizer that exists."""
MOST_GIVEN_BYTES: Final = 1 << 30
"""The limit of texts that the user names."""
_PIECE_BYTES: Final = 16 << 20
_HASHED_BYTES: Final = 256 << 10  # Fits a core's own cache.
TOO_MANY_OPEN: Final = frozenset({errno.EMFILE, errno.ENFILE})
_SHARED: Final = re.compile(r"([0-9a-f]{2})/\1[0-9a-f]{62}")


def inside(directory: Path, name: str, error: type[NpuqError] = CheckpointError) -> Path:
    """The path of a regular file inside `directory`, by its relative name.

    Links may lead to other files of the directory. One kind of link out is accepted: the Hugging Face cache keeps
    `models--OWNER--NAME/snapshots/REVISION/…/FILE` as a link to `blobs/HASH` of the same repository folder, which may
    be a link to `blobs/HA/HASH` of the whole cache. Raises `error` when the name or a link leads elsewhere, and when
    there is no such file.
    """
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise error(f"{directory}: {name!r} lies outside the directory; refusing to read it")
    path = directory / name
    try:
        root, target = directory.resolve(), path.resolve()
        exists, regular = target.exists(), target.is_file()
    except (OSError, RuntimeError, ValueError) as cause:  # a link to itself, a NUL or a surrogate in the name
        raise error(f"{directory}: {name!r} is no file that can be opened; fetch it again") from cause
    if not target.is_relative_to(root) and not _is_content(root, target):
        raise error(f"{path}: a link to {printable(str(target))}, outside the directory; refusing to read it")
    if not exists:
        raise error(f"{path}: missing; fetch it again")
    if not regular:
        raise error(f"{path}: is not a regular file; refusing to read it")
    return path


def is_inside(directory: Path, name: str) -> bool:
    """True where `directory` has an entry of that name, also one that `inside` refuses, such as a dangling link."""
    return os.path.lexists(directory / name)


def _is_content(root: Path, target: Path) -> bool:
    """True for a blob of the Hugging Face cache, if `root` is a snapshot of its repository or a folder in one."""
    for folder in (root, *root.parents):
        repository = folder.parent.parent
        if folder.parent.name == "snapshots" and repository.name.startswith("models--"):
            shared = repository.parent / "blobs"
            return target.is_relative_to(repository / "blobs") or (
                # Content fetched through Xet: one store for all repositories of the cache.
                target.is_relative_to(shared) and _SHARED.fullmatch(str(target.relative_to(shared))) is not None
            )
    return False


class FileStamp(NamedTuple):
    """The metadata that changes with a file's content: only setting the clock can set ctime back."""

    nbytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileStamp:
        """The stamp of a result of `stat` or `fstat`."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def open_file(path: Path, error: type[NpuqError]) -> int:
    """Open a regular file for reading and return its descriptor. Never blocks, as a FIFO would. Raises `error`."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as cause:
        raise error(f"{path}: missing") from cause
    except (OSError, ValueError) as cause:  # ValueError: a NUL or a surrogate in the name
        raise error(f"{path}: cannot be read: {reason(cause)}") from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: is not a regular file; refusing to read it")
    return descriptor


def reason(error: OSError | ValueError) -> str:
    """The system's message, with the remedy where too many files are open."""
    if isinstance(error, OSError) and error.errno in TOO_MANY_OPEN:
        return f"{error.strerror}; raise the limit (ulimit -n) and run the same command again"
    return getattr(error, "strerror", None) or str(error)


def read_bytes(path: Path, error: type[NpuqError], most: int = MOST_BYTES) -> bytes:
    """Read a regular file of at most `most` bytes. Raises `error`."""
    with open(open_file(path, error), "rb") as file:
        try:
            return _read(file, path, error, most)
        except OSError as cause:
            raise error(f"{path}: cannot be read: {cause.strerror}") from cause


def read_text(path: Path, error: type[NpuqError], most: int = MOST_BYTES) -> str:
    """Read a UTF-8 file of at most `most` bytes, line ends as `\\n`. Raises `error`."""
    return decoded(read_bytes(path, error, most), path, error)


def file_sha256(path: Path, error: type[NpuqError]) -> str:
    """Compute the sha256 of a regular file of any size, in hexadecimal. Raises `error`."""
    digest, buffer = hashlib.sha256(), bytearray(_HASHED_BYTES)
    with open(open_file(path, error), "rb", buffering=0) as file:
        try:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
        except OSError as cause:
            raise error(f"{path}: cannot be read: {cause.strerror}") from cause
    return digest.hexdigest()


def read_given_bytes(path: Path, error: type[NpuqError], most: int = MOST_GIVEN_BYTES) -> bytes:
    """Read a file or pipe that the user named, such as `<(command)`, of at most `most` bytes. Raises `error`."""
    try:
        with path.open("rb") as file:
            return _read(file, path, error, most)
    except FileNotFoundError as cause:
        raise error(f"{path}: no such file") from cause
    except (OSError, ValueError) as cause:  # ValueError: a NUL in the name
        raise error(f"{path}: cannot be read: {getattr(cause, 'strerror', None) or cause}") from cause


def read_given_text(path: Path, error: type[NpuqError], most: int = MOST_GIVEN_BYTES) -> str:
    """Read UTF-8 text, line ends as `\\n`; otherwise as `read_given_bytes`."""
    return decoded(read_given_bytes(path, error, most), path, error)


def read_stream_text(file: IO[bytes], where: Path, error: type[NpuqError], most: int = MOST_GIVEN_BYTES) -> str:
    """Read an open file, such as standard input; otherwise as `read_given_text`."""
    try:
        return decoded(_read(file, where, error, most), where, error)
    except (OSError, ValueError) as cause:  # ValueError: it was closed
        raise error(f"{where}: cannot be read: {getattr(cause, 'strerror', None) or cause}") from cause


def decoded(content: bytes, path: Path, error: type[NpuqError]) -> str:
    """Decode a UTF-8 file's content, line ends as `\\n`. Raises `error`, naming the file."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as cause:
        raise error(f"{path}: is not UTF-8 text (byte {cause.start}); convert it to UTF-8") from cause
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read(file: IO[bytes], path: Path, error: type[NpuqError], most: int) -> bytes:
    content = bytearray()
    # In pieces: read(most + 1) would allocate all of that memory first.
    while piece := file.read(min(_PIECE_BYTES, most + 1 - len(content))):
        content += piece
    if len(content) > most:
        raise error(f"{path}: is larger than the {most} bytes that npuq reads of such a file")
    return bytes(content)
