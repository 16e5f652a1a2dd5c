"""What npuq asks of a hub, whichever it is. A hub is one folder that implements these protocols, and a line in `_HUBS`.

To pull is `Hub.locate`: a `Repository` to fetch from, and the `Place` of the hub's own cache. To push is
`Hub.open_upload`: an `Upload` into a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final, Protocol

from ..choices import HUBS
from ..errors import HubError, NpuqError
from ..inputs.names import FileName
from ..progress import Progress
from .listing import Listing, Wanted
from .local_files import LocalFile
from .names import CommitId, RepoId, Revision
from .transfer.retry import Backoff, Client

# Where each hub's class is: imported when it is asked for, with the client that it stands on.
_HUBS: Final = {
    "huggingface": (".huggingface.hub", "HuggingFace"),
    "modelscope": (".modelscope.hub", "ModelScope"),
}


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: its status, its headers (found in any case), and its body in pieces, as it was sent."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]

    @property
    def is_compressed(self) -> bool:
        return self.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")


class Repository(Client, Protocol):
    """A repository on a hub at one revision: what fetching needs."""

    @property
    def repo(self) -> RepoId: ...

    @property
    def commit(self) -> CommitId | None:
        """The commit that it is read at; None where a hub reads branches only."""

    def listing(self) -> Listing:
        """All files. Raises HubError."""

    def open(self, name: FileName, start: int, end: int) -> AbstractContextManager[Answer]:
        """Ask for bytes [start, end) of a file. Raises what the client raises."""


class Place(Protocol):
    """A directory that the files of one revision are fetched into."""

    directory: Path

    def manifest(self) -> bytes | None:
        """The manifest of this very revision, where it is here and whole already."""

    def bring_manifest(self, repository: Repository, listing: Listing) -> bytes:
        """The manifest, fetched and checked. Raises HubError."""

    def begin(self, sealed: bytes, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Make ready for the artifact of this manifest; returns which of its files are missing. Raises HubError."""

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """Those files that are not there with the right content."""

    def fetch(self, repository: Repository, wanted: Wanted, advance: Callable[[int], object]) -> None:
        """Fetch one file and check it; thread-safe. HubError when it is not what it must be."""

    def remember(self) -> None:
        """Note what was checked, for the next time."""

    def finish(self) -> Path:
        """Everything is there; returns the directory."""


@dataclass(frozen=True)
class Located:
    """A revision of a repository as it is found, and where a pull without a directory brings it.

    `unanswered` is why the hub cannot be asked, where `place` has what was fetched before: asking again would make the
    user wait for nothing.
    """

    repository: Repository
    place: Place
    unanswered: HubError | None = None


class Upload(Protocol):
    """A push into one branch, which this user may write to: what sending needs."""

    @property
    def revision(self) -> Revision: ...

    @property
    def page(self) -> str:
        """The address of the repository, for the user."""

    @property
    def pull_request(self) -> str | None:
        """The address of the pull request that the push goes to."""

    @property
    def commits_together(self) -> bool:
        """Whether one commit takes any number of files; else each file is a commit."""

    def head(self) -> tuple[Repository, Listing]:
        """What the branch holds now. Raises HubError."""

    def begin(self, listing: Listing, note: bytes) -> None:
        """Put `note` there as npuq/unfinished.json and take the manifest away: from here on no reader takes the branch
        for an artifact. Raises HubError."""

    def send(self, files: Sequence[LocalFile], progress: Progress) -> dict[str, NpuqError]:
        """Send and commit files; returns those that failed, with why. Content that is there is not sent again."""

    def finish(self, contents: Mapping[FileName, bytes], removed: Sequence[FileName]) -> CommitId | None:
        """Commit contents, the manifest last, and remove files and the note; returns the last commit where the hub
        tells it. Raises HubError."""

    def tag(self, name: str, commit: CommitId | None) -> None:
        """Tag the result. HubError where the tag means something else."""

    def publish(self) -> None:
        """Everything is there: a pull request is a draft no more. Raises HubError."""


class Hub(Protocol):
    """A hub and one repository there, as one user sees them."""

    @property
    def repo(self) -> RepoId: ...

    @property
    def default_branch(self) -> Revision: ...

    def errors(self, doing: str) -> AbstractContextManager[None]:
        """Errors of the hub, the connection and the disk that are raised inside become a HubError of one line that
        begins with `doing` and holds no secret."""

    def locate(self, revision: Revision) -> Located:
        """Find a branch, a tag or a commit. Raises HubError."""

    def open_upload(self, *, private: bool | None, revision: str | None, create_pr: bool, title: str) -> Upload:
        """Check that the user may write, and make repository and branch where they are not there. Raises HubError."""


def open_hub(name: str, repo: str, token: str | None = None, backoff: Backoff | None = None) -> Hub:
    """The hub of this name (one of `choices.HUBS`), asked as the user of `token`; None: the client's own.

    Raises HubError for another name, for what is no repository's name, and where the hub's client is not installed.
    """
    if name not in _HUBS:
        raise HubError(f"{name!r} is not a hub that npuq knows; give one of {', '.join(HUBS)}")
    module, kind = _HUBS[name]
    hub: Hub = getattr(import_module(module, __package__), kind)(repo, token, backoff)
    return hub
