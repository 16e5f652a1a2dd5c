"""Which paths the process opens, makes, renames, removes or links while it is watched, whoever does it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Events of Python's own file functions, and which of their arguments are paths.
_EVENTS = {
    "open": (0,),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.rename": (0, 1),
    "os.link": (0, 1),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "os.utime": (0,),
    "os.listdir": (0,),
    "os.scandir": (0,),
    "shutil.copyfile": (0, 1),
    "shutil.move": (0, 1),
    "shutil.rmtree": (0,),
}
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_READS = ("os.listdir", "os.scandir")
_watching: list[Watch] = []
_hooked = False


class Watch:
    """What was seen: paths that were written, and those that were only read."""

    def __init__(self) -> None:
        self.written: set[str] = set()
        self.read: set[str] = set()

    def outside(self, *roots: Path) -> list[str]:
        """The written paths that lie below none of the roots. Python's compiled modules are not counted."""
        written = (path for path in self.written if path != os.devnull and "__pycache__" not in path)
        return _below_none(written, roots)

    def read_outside(self, mark: str, *roots: Path) -> list[str]:
        """The paths with this text in them that were opened below none of the roots."""
        return _below_none((path for path in self.read if mark in path), roots)


def _below_none(paths: Iterable[str], roots: Sequence[Path]) -> list[str]:
    allowed = [root.resolve() for root in roots]
    return sorted(path for path in paths if not any(_real(path).is_relative_to(root) for root in allowed))


def _real(path: str) -> Path:
    """The path that is meant, of something that may be gone: the links of its folder are followed, its own is not."""
    return Path(path).parent.resolve() / Path(path).name


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    positions = _EVENTS.get(event) if _watching else None
    if positions is None:
        return
    writes = event not in _READS and not (event == "open" and not _opens_for_writing(arguments))
    for position in positions:
        path = arguments[position]
        if isinstance(path, (str, bytes, os.PathLike)):
            text = str(Path(os.fsdecode(path)).absolute())
            for watch in _watching:
                (watch.written if writes else watch.read).add(text)


def _opens_for_writing(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(isinstance(flags, int) and flags & _WRITE_FLAGS) or (
        isinstance(mode, str) and not set("wax+").isdisjoint(mode)
    )


@contextmanager
def watched() -> Iterator[Watch]:
    """Note every path from here on, in all threads."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    watch = Watch()
    _watching.append(watch)
    try:
        yield watch
    finally:
        _watching.remove(watch)
