"""Additions of a push, uploaded by LFS.

huggingface_hub uploads by Xet wherever hf_xet is installed, without asking the hub for Xet support. Every hub takes
LFS, with Xet behind it or without. With LFS each byte sent is counted, present content is found by its hash, and each
fault of a connection has a test. The client uploads file objects by LFS.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from huggingface_hub import CommitOperationAdd

from ...inputs.names import FileName
from ..listing import Listing


class _AboutLfs(logging.Filter):
    """Drops the client's warning that a file object goes by LFS, which is intended here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "not supported by Xet Storage" not in record.getMessage()


_ABOUT_LFS: Final = _AboutLfs()


def expect_lfs() -> None:
    """Silence the client's warning about LFS. Call it before additions are sent; repeated calls do nothing."""
    logging.getLogger("huggingface_hub._commit_api").addFilter(_ABOUT_LFS)


class Addition(CommitOperationAdd):
    """A file for a commit, opened anew for every attempt to send it."""

    name: FileName
    _open: Callable[[], BinaryIO]

    @classmethod
    def of(cls, name: FileName, content: bytes) -> Addition:
        """Make an addition of content in memory."""
        return cls._made(name, lambda: io.BytesIO(content))

    @classmethod
    def read_from(cls, name: FileName, path: Path, advance: Callable[[int], object]) -> Addition:
        """Make an addition of a file, which is hashed now. `advance` gets the number of bytes of each read for
        sending."""
        addition = cls._made(name, lambda: path.open("rb"))
        addition._open = lambda: _TrackedFile(str(path), advance)
        return addition

    @classmethod
    def _made(cls, name: FileName, open_content: Callable[[], BinaryIO]) -> Addition:
        with open_content() as file:
            # The client reads size and hash from it.
            addition = cls(str(name), file)
        addition.name, addition._open = name, open_content
        return addition

    def is_in(self, listing: Listing) -> bool:
        """True where the hub has this content under this name."""
        there = listing.files.get(self.name)
        if there is None or there.size != self.upload_info.size:
            return False
        if there.sha256 is not None:
            return there.sha256 == self.upload_info.sha256.hex()
        with self.as_file() as file:
            return there.holds(file.read())

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with self._open() as file:
            yield file


class _TrackedFile(io.FileIO):
    """A file that passes its read bytes to `advance`, counting no byte twice when a request is sent again."""

    def __init__(self, path: str, advance: Callable[[int], object]):
        super().__init__(path)
        self._advance = advance
        self._furthest = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        position = self.tell()
        if position > self._furthest:
            self._advance(position - self._furthest)
            self._furthest = position
        return data
