"""Checked types of names and hashes from outside."""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

from ..errors import NpuqError
from .printable import printable

_MOST_NAME_BYTES: Final = 255
_MOST_PATH_BYTES: Final = 1024
_MOST_REPO_CHARACTERS: Final = 193
_REPO: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

_Text = TypeVar("_Text", bound="CheckedText")


class CheckedText(str):
    """A text in the form of its type: construction from another text raises ValueError."""

    __slots__ = ()
    described = "text"

    def __new__(cls: type[_Text], value: str) -> _Text:
        if not cls.fits(value):
            raise ValueError(f"{printable(repr(value)[:80])} is not {cls.described}")
        return super().__new__(cls, value)

    @classmethod
    def holds(cls, value: str) -> bool:
        """True for a text in this type's form."""
        raise NotImplementedError

    @classmethod
    def parse(cls: type[_Text], value: Any, where: str, error: type[NpuqError]) -> _Text:
        """Check a value from `where`. Raises `error`."""
        try:
            return cls(value)
        except ValueError as cause:
            raise error(f"{where}: {cause}") from cause

    @classmethod
    def fits(cls, value: Any) -> bool:
        """True for a value that `parse` accepts."""
        return isinstance(value, str) and cls.holds(value)


class FileName(CheckedText):
    """A relative path with `/` between its parts that stays below the directory it is joined to."""

    __slots__ = ()
    described = "a file name that may be used"

    @classmethod
    def holds(cls, value: str) -> bool:
        try:
            parts = [part.encode("utf-8") for part in value.split("/")]
        except UnicodeEncodeError:
            return False
        return (
            "\\" not in value
            and printable(value) == value
            and all(part not in (b"", b".", b"..") and len(part) <= _MOST_NAME_BYTES for part in parts)
            and sum(map(len, parts)) + len(parts) <= _MOST_PATH_BYTES
        )


class RepoId(CheckedText):
    """The name of a repository on a hub, `user/name`."""

    __slots__ = ()
    described = "a repository: write it as user/name"

    @classmethod
    def holds(cls, value: str) -> bool:
        return len(value) <= _MOST_REPO_CHARACTERS and _REPO.fullmatch(value) is not None and ".." not in value


class Sha256(CheckedText):
    """64 lower-case hexadecimal digits."""

    __slots__ = ()
    described = "a sha256 of 64 lower-case hexadecimal digits"

    @classmethod
    def holds(cls, value: str) -> bool:
        return _SHA256.fullmatch(value) is not None
