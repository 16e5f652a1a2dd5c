"""SHA-256 of files, two at a time where that takes hardly longer than one (`native/sha256.py`)."""

from __future__ import annotations

from contextlib import ExitStack
from io import FileIO
from pathlib import Path

from ..errors import NpuqError
from ..inputs.files import file_sha256, open_file
from ..native.sha256 import new_digest, two_at_once, update_two

_CHUNK = 512 << 10


def most_together() -> int:
    """The number of files that one call of `file_hashes` should get."""
    return 2 if two_at_once() else 1


def file_hashes(paths: list[Path], error: type[NpuqError]) -> list[str]:
    """Compute the sha256 of regular files of any size, in hexadecimal. Raises `error` for any of them."""
    if len(paths) != 2:
        return [file_sha256(path, error) for path in paths]
    first, second = new_digest(), new_digest()
    with ExitStack() as opened:
        files = [opened.enter_context(FileIO(open_file(path, error))) for path in paths]
        memory = [memoryview(bytearray(_CHUNK)) for _ in paths]
        while True:
            pieces = [
                _filled(file, buffer, path, error) for file, buffer, path in zip(files, memory, paths, strict=True)
            ]
            if not any(pieces):
                return [first.hexdigest(), second.hexdigest()]
            both = min(map(len, pieces))
            if both:
                update_two(first, pieces[0][:both], second, pieces[1][:both])
            for digest, piece in zip((first, second), pieces, strict=True):
                if len(piece) > both:
                    digest.update(piece[both:])


def _filled(file: FileIO, buffer: memoryview, path: Path, error: type[NpuqError]) -> memoryview:
    """The next bytes of a file: a whole buffer, but at its end."""
    count = 0
    try:
        while count < len(buffer) and (more := file.readinto(buffer[count:])):
            count += more
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror}") from cause
    return buffer[:count]
