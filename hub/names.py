"""Checked types of a hub's names (repositories, revisions, commits, contents) and sizes.

Paths, addresses and file names are built from these types alone, and from FileName and Sha256 of `inputs.names`.
"""

from __future__ import annotations

import re
from typing import Any, Final, TypeAlias, TypeVar

from ..errors import HubError
from ..inputs.names import CheckedText, FileName, Sha256
from ..inputs.names import RepoId as RepoId  # beside the other types of names

_SHA1: Final = re.compile(r"[0-9a-f]{40}")
_MOST_SIZE: Final = 2**63


class HubRepoId(RepoId):
    """`user/name` on Hugging Face, which allows no `--`, so that every repository has a folder of its own."""

    __slots__ = ()

    @classmethod
    def holds(cls, value: str) -> bool:
        return super().holds(value) and "--" not in value

    @property
    def folder(self) -> str:
        """The name of the repository's folder."""
        return self.replace("/", "--")


class Revision(CheckedText):
    """A branch, a tag or a commit, by git's rules for names: a relative path without `..`."""

    __slots__ = ()
    described = "a branch, tag or commit"

    @classmethod
    def holds(cls, value: str) -> bool:
        return (
            FileName.holds(value)
            and not any(character in value for character in " ~^:?*[")
            and not any(part in value for part in ("..", "@{"))
            and not any(part.startswith((".", "-")) or part.endswith((".", ".lock")) for part in value.split("/"))
        )


class CommitId(CheckedText):
    """40 lower-case hexadecimal digits that name a commit."""

    __slots__ = ()
    described = "a commit of 40 lower-case hexadecimal digits"

    @classmethod
    def holds(cls, value: str) -> bool:
        return _SHA1.fullmatch(value) is not None


class BlobId(CheckedText):
    """git's name of a file's content: 40 lower-case hexadecimal digits."""

    __slots__ = ()
    described = "a content's hash of 40 lower-case hexadecimal digits"

    @classmethod
    def holds(cls, value: str) -> bool:
        return _SHA1.fullmatch(value) is not None


Digest: TypeAlias = Sha256 | BlobId

_Repo = TypeVar("_Repo", bound=RepoId)


def parse_repo(text: str, kind: type[_Repo]) -> _Repo:
    """Parse a user's repository name. HubError for a malformed one."""
    try:
        return kind(text)
    except ValueError as error:
        raise HubError(str(error)) from None


def parse_revision(text: str | None, default: Revision) -> Revision:
    """Parse a user's revision; None gives `default`. HubError for a malformed one."""
    try:
        return default if text is None else Revision(text)
    except ValueError as error:
        raise HubError(str(error)) from None


def byte_count(value: Any, where: str, error: type[Exception] = HubError) -> int:
    """Check a file's size from outside: a whole number from 0 to 2^63 − 1. Raises `error`."""
    if type(value) is not int or not 0 <= value < _MOST_SIZE:
        raise error(f"{where}: {repr(value)[:40]} is no size of a file")
    return value
