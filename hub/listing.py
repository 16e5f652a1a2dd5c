"""The checked listing of a repository's files at one revision, and the files wanted from it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..errors import HubError
from ..inputs.names import FileName, Sha256
from ..inputs.printable import printable
from .names import Digest, RepoId
from .transfer.digests import content_holds

# Above any repository of a model; an endless listing must not fill memory.
MOST_FILES: Final = 100_000
# The parts of an unusable name that messages show: its beginning and its end.
_SHOWN_CHARACTERS: Final = 100


@dataclass(frozen=True)
class RemoteFile:
    """A listed file: its size in bytes and its content's hash, None where the hub lists none.

    Hugging Face lists the sha256 of LFS files and git's hash of others, ModelScope the sha256 of all.
    """

    size: int
    digest: Digest | None

    @property
    def sha256(self) -> Sha256 | None:
        return self.digest if isinstance(self.digest, Sha256) else None

    def holds(self, content: bytes) -> bool:
        """True where the file has this content."""
        return self.digest is not None and content_holds(content, self.size, self.digest)


@dataclass(frozen=True)
class Listing:
    """The files of a revision. `unusable` has the names that npuq never fetches, as text for messages."""

    files: Mapping[FileName, RemoteFile]
    unusable: tuple[str, ...] = field(default=())

    def holds(self, name: FileName, content: bytes) -> bool:
        """True where a file of this name and content is listed."""
        return name in self.files and self.files[name].holds(content)


@dataclass(frozen=True)
class Wanted:
    """A file to fetch: its name, its size, and the `digest` of its content by the manifest, without one by the hub.
    `listed` is the hub's own digest, once its listing is known."""

    name: FileName
    size: int
    digest: Digest
    listed: Digest | None = None

    @property
    def digests(self) -> set[Digest]:
        return {self.digest} if self.listed is None else {self.digest, self.listed}


def as_listed(repo: str, name: FileName, listing: Listing) -> Wanted:
    """A wanted file with the hub's listed hash. HubError where the hub lists none."""
    file = listing.files[name]
    if file.digest is None:
        raise HubError(f"{repo}: the hub lists no hash of {name}; npuq fetches nothing that it cannot check")
    return Wanted(name, file.size, file.digest)


# A function from an entry of a hub's listing and its origin to name, size and digest; None for an entry that is no
# file.
Entry = Callable[[Any, str], tuple[Any, int, Digest | None] | None]


def parse_listing(entries: Iterable[Any], repo: RepoId, parse: Entry) -> Listing:
    """Parse a hub's listing from its entries, each with `parse`.

    Raises HubError for a malformed listing. Names that are no valid FileName are set aside: foreign repositories have
    such files, and npuq never fetches them.
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
