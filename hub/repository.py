"""What fetching needs of a hub, whichever it is: a checked listing, and answers whose bodies are read as they come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from ..errors import NpuqError
from ..inputs.names import FileName, Sha256
from .digests import content_holds
from .names import Digest, RepoId

if TYPE_CHECKING:
    from .client import Backoff


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: its status, its headers (found in any case), and its body in pieces, as it was sent."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]

    @property
    def is_compressed(self) -> bool:
        return self.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")


@dataclass(frozen=True)
class RemoteFile:
    """A file as a hub lists it: its size in bytes and its content's hash, None where the hub does not tell.

    Hugging Face tells the sha256 of LFS files and git's hash of others, ModelScope the sha256 of all.
    """

    size: int
    digest: Digest | None

    @property
    def sha256(self) -> Sha256 | None:
        return self.digest if isinstance(self.digest, Sha256) else None

    def holds(self, content: bytes) -> bool:
        """Whether it is this content."""
        return self.digest is not None and content_holds(content, self.size, self.digest)


@dataclass(frozen=True)
class Listing:
    """The files of a revision. `unusable` are names that no file of ours could have, as text for messages."""

    files: Mapping[FileName, RemoteFile]
    unusable: tuple[str, ...] = field(default=())


class Repository(Protocol):
    """A repository on a hub at one revision."""

    @property
    def repo(self) -> RepoId: ...

    @property
    def backoff(self) -> Backoff: ...

    @property
    def raised(self) -> tuple[type[Exception], ...]:
        """What asking may raise; anything else is a mistake of ours, or of whoever takes the bytes."""

    def listing(self) -> Listing:
        """All files. Raises HubError."""

    def open(self, name: FileName, start: int, end: int) -> AbstractContextManager[Answer]:
        """Ask for bytes [start, end) of a file. Raises what the client raises."""

    def is_transient(self, error: BaseException) -> bool:
        """Whether the same request may succeed a little later."""

    def asked_seconds(self, error: BaseException) -> float:
        """How long an answer asks to wait; 0 where it does not say."""

    def failure(self, doing: str, error: Exception) -> NpuqError:
        """The error for the user, in one line that begins with `doing`."""
