"""Additions of a push, whose content goes up by LFS.

huggingface_hub sends content through Xet wherever hf_xet is installed, and asks no hub whether it has Xet. Every hub
takes LFS, with Xet behind it or without; by LFS each byte sent is counted, content that is there is known by its hash,
and each fault of a connection has a test. The client decides by what an addition is made of: a file object goes by LFS.
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
    """Drops the client's warning that a file object goes by LFS: here that is meant."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "not supported by Xet Storage" not in record.getMessage()


_ABOUT_LFS: Final = _AboutLfs()


def expect_lfs() -> None:
    """Do not let the client warn of what is meant. To be called before additions are sent, as often as one likes."""
    logging.getLogger("huggingface_hub._commit_api").addFilter(_ABOUT_LFS)


class Addition(CommitOperationAdd):
    """A file for a commit, opened anew whenever it is sent."""

    name: FileName
    _open: Callable[[], BinaryIO]

    @classmethod
    def of(cls, name: FileName, content: bytes) -> Addition:
        """An addition of content in memory."""
        return cls._made(name, lambda: io.BytesIO(content))

    @classmethod
    def read_from(cls, name: FileName, path: Path, advance: Callable[[int], object]) -> Addition:
        """An addition of a file, which is hashed now, and told to `advance` as its bytes are read for sending."""
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
        """Whether the hub has this content under this name."""
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
    """Reports how far reading has come, counting no byte twice when a request is sent again."""

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
