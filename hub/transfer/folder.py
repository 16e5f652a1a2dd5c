"""The user's folder as target of a pull: claimed first, then filled; its manifest comes last."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import HubError
from ...formats.artifact import OWN_FOLDER
from ...inputs.files import inside, read_bytes
from ...inputs.json_text import parse_object
from ...inputs.names import FileName, Sha256
from ...inputs.printable import printable
from ..hub import Repository
from ..listing import Listing, Wanted
from ..manifest import MANIFEST, MOST_MANIFEST_BYTES, listed_names
from ..names import RepoId, Revision
from .digests import content_digest, file_holds
from .download import read_whole
from .fetch import fetch_file
from .partial import PARTIAL_SUFFIX, write_whole

# In the folder from the beginning of a pull to its end.
_PULLING = FileName(f"{OWN_FOLDER}/pulling.json")


@dataclass(frozen=True)
class Source:
    """The origin of a folder's artifact."""

    repo: RepoId
    revision: Revision


class FolderPlace:
    """A folder of the user. Only the artifact's files are written, and no other is touched.

    During a pull from `source`, `npuq/pulling.json` lists the artifact's files, so that two artifacts are never mixed:
    another artifact is refused, and the files of an earlier state of the same branch are removed. With `follows`, for a
    folder in the client's cache, a finished artifact is replaced too.
    """

    def __init__(self, directory: Path, source: Source, *, follows: bool = False):
        self.directory = directory
        self._source = source
        self._follows = follows
        self._sealed = b""
        self._names: frozenset[FileName] = frozenset()
        self._stale: frozenset[FileName] = frozenset()

    def manifest(self) -> bytes | None:
        """None: a local manifest may be of an earlier state of the branch."""
        return None

    def bring_manifest(self, repository: Repository, listing: Listing) -> bytes:
        return read_whole(repository, MANIFEST, listing.files[MANIFEST], MOST_MANIFEST_BYTES)

    def begin(self, sealed: bytes, wanted: Sequence[Wanted]) -> list[Wanted]:
        self._sealed = sealed
        self._names = frozenset(file.name for file in wanted)
        self._stale = self._claim()
        return self.missing(wanted)

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        result = []
        for file in wanted:
            self._check_parent(self.directory / file.name)
            if not file_holds(self.directory / file.name, file.size, [file.digest]):
                result.append(file)
        return result

    def fetch(self, repository: Repository, wanted: Wanted, advance: Callable[[int], object]) -> None:
        fetch_file(repository, wanted, self.directory / wanted.name, advance)

    def remember(self) -> None:
        return

    def finish(self) -> Path:
        for name in self._stale:
            path = self.directory / name
            self._check_parent(path)
            for each in (path, path.with_name(path.name + PARTIAL_SUFFIX)):
                with contextlib.suppress(FileNotFoundError):
                    each.unlink()
        write_whole(self.directory / MANIFEST, self._sealed)
        (self.directory / _PULLING).unlink(missing_ok=True)
        return self.directory

    def _claim(self) -> frozenset[FileName]:
        """Claim the folder: one that npuq made or found empty, marked by its own subfolder. Returns the files of an
        earlier state of the branch."""
        own, held = self.directory / OWN_FOLDER, self.directory / MANIFEST
        if self.directory.exists() and not self.directory.is_dir():
            raise HubError(f"{self.directory}: exists and is not a directory; choose another")
        if self.directory.exists() and not own.is_dir() and any(self.directory.iterdir()):
            raise HubError(f"{self.directory}: is not empty and holds no artifact of npuq's; choose another directory")
        self._check_parent(held)
        left = self._begun()
        if held.exists():
            if file_holds(held, len(self._sealed), [content_digest(self._sealed, Sha256)]):
                if not left:
                    return left
            elif not self._follows:
                raise HubError(
                    f"{self.directory}: holds another artifact, or another revision; choose another directory"
                )
            else:
                left |= set(listed_names(read_bytes(held, HubError, MOST_MANIFEST_BYTES), "files")) - self._names
        else:
            self._refuse_strays(left)
        names = sorted({*self._names, *left})
        note = {"repository": self._source.repo, "revision": self._source.revision, "files": names}
        write_whole(self.directory / _PULLING, json.dumps(note, indent=1).encode() + b"\n")
        held.unlink(missing_ok=True)
        return left

    def _begun(self) -> frozenset[FileName]:
        """The files of an unfinished pull that this artifact lacks."""
        if not os.path.lexists(self.directory / _PULLING):
            return frozenset()
        content = read_bytes(inside(self.directory, _PULLING, HubError), HubError, MOST_MANIFEST_BYTES)
        note = parse_object(content, str(self.directory / _PULLING), HubError)
        if not self._follows and (note.get("repository"), note.get("revision")) != (
            self._source.repo,
            self._source.revision,
        ):
            raise HubError(
                f"{self.directory}: holds a part of another artifact, or of another revision; choose another "
                "directory, or remove this one"
            )
        return frozenset(listed_names(content, "files")) - self._names

    def _refuse_strays(self, left: Container[str]) -> None:
        """Raise HubError for weights of unknown origin: engines would load them too."""
        for path in self.directory.glob("*.safetensors"):
            if path.name not in self._names and path.name not in left:
                raise HubError(f"{printable(str(path))}: is not of this artifact; choose another directory")

    def _check_parent(self, path: Path) -> None:
        """Raise HubError where a link of the directory leads out of it."""
        if not path.parent.resolve().is_relative_to(self.directory.resolve()):
            raise HubError(f"{path.parent}: a link out of the directory; refusing to write there")
