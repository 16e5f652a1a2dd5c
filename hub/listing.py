"""What a hub says of the files of a repository at one revision, checked, and what is wanted of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import HubError
from ..inputs.names import FileName, Sha256
from ..inputs.printable import printable
from .names import Digest, RepoId
from .transfer.digests import content_holds

# Above any repository that holds a model; a listing without end must not fill the memory.
MOST_FILES: Final = 100_000
# Of a name that no file of ours could have: its beginning and its end are kept, for messages.
_SHOWN_CHARACTERS: Final = 100


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

    def holds(self, name: FileName, content: bytes) -> bool:
        """Whether a file is there with this content."""
        return name in self.files and self.files[name].holds(content)


@dataclass(frozen=True)
class Wanted:
    """A file to fetch, its size and what its content must be: `digest` from the manifest, or from the hub where there
    is none; `listed` is the hub's own, once it was asked."""

    name: FileName
    size: int
    digest: Digest
    listed: Digest | None = None

    @property
    def digests(self) -> set[Digest]:
        return {self.digest} if self.listed is None else {self.digest, self.listed}


def as_listed(repo: str, name: FileName, listing: Listing) -> Wanted:
    """A file as the hub lists it, which vouches for its content. HubError where it tells no hash."""
    file = listing.files[name]
    if file.digest is None:
        raise HubError(f"{repo}: the hub lists no hash of {name}; npuq fetches nothing that it cannot check")
    return Wanted(name, file.size, file.digest)


# Given an entry of a hub's listing and where it is from: its name, size and digest, or None for what is no file.
Entry = Callable[[Any, str], tuple[Any, int, Digest | None] | None]


def parse_listing(entries: Iterable[Any], repo: RepoId, parse: Entry) -> Listing:
    """A hub's listing from its entries, each read by `parse`.

    Raises HubError for what is no listing. A name that no file of ours may have is set aside: others' repositories
    hold all kinds of names, and none of those is fetched.
    """
    where = f"{repo}: the hub's listing"
    files: dict[FileName, RemoteFile] = {}
    unusable: list[str] = []
    for number, entry in enumerate(entries):
        if number >= MOST_FILES:
            raise HubError(f"{where}: more than {MOST_FILES} entries; npuq reads no such repository")
        parsed = parse(entry, where)
        if parsed is None:
            continue
        name, size, digest = parsed
        if not isinstance(name, str) or not FileName.holds(name):
            unusable.append(_shown(str(name)))
            continue
        if name in files:
            raise HubError(f"{where}: names {name!r} twice")
        files[FileName(name)] = RemoteFile(size, digest)
    return Listing(files, tuple(unusable))


def _shown(name: str) -> str:
    if len(name) > 2 * _SHOWN_CHARACTERS:
        name = f"{name[:_SHOWN_CHARACTERS]}…{name[-_SHOWN_CHARACTERS:]}"
    return printable(name)
