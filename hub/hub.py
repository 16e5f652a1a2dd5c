"""The protocols of a hub. Each hub is one folder that implements them, and a line in `_HUBS`.

Pulling begins with `Hub.locate`: a `Repository` to fetch from, and the `Place` in the hub's own cache. Pushing begins
with `Hub.open_upload`: an `Upload` into a branch.
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

# The module of each hub's class, imported at first use together with the hub's client.
_HUBS: Final = {
    "huggingface": (".huggingface.hub", "HuggingFace"),
    "modelscope": (".modelscope.hub", "ModelScope"),
}


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: status, headers (case-insensitive), and the undecoded body in pieces."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]

    @property
    def is_compressed(self) -> bool:
        return self.headers.get("Content-Encoding", "").strip().lower() not in ("", "identity")


class Repository(Client, Protocol):
    """A repository on a hub at one revision, to fetch from."""

    @property
    def repo(self) -> RepoId: ...

    @property
    def commit(self) -> CommitId | None:
        """The commit to read; None where a hub reads branches only."""

    def listing(self) -> Listing:
        """List all files. Raises HubError."""

    def open(self, name: FileName, start: int, end: int) -> AbstractContextManager[Answer]:
        """Request bytes [start, end) of a file. Raises the client's errors."""


class Place(Protocol):
    """The target directory of one revision's files."""

    directory: Path

    def manifest(self) -> bytes | None:
        """The manifest of exactly this revision, where a whole local copy exists."""

    def bring_manifest(self, repository: Repository, listing: Listing) -> bytes:
        """Fetch and check the manifest. Raises HubError."""

    def begin(self, sealed: bytes, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Prepare for the artifact of this manifest; returns its missing files. Raises HubError."""

    def missing(self, wanted: Iterable[Wanted]) -> list[Wanted]:
        """The files that are absent or have other content."""

    def fetch(self, repository: Repository, wanted: Wanted, advance: Callable[[int], object]) -> None:
        """Fetch one file and check it; thread-safe. HubError for wrong content."""

    def remember(self) -> None:
        """Save the checked files' hashes for the next run."""

    def finish(self) -> Path:
        """End a complete pull; returns the directory."""


@dataclass(frozen=True)
class Located:
    """A revision of a repository, and the default place of a pull.

    unanswered: the error of a hub that did not answer while `place` has an earlier copy; asking again would only wait.
    """

    repository: Repository
    place: Place
    unanswered: HubError | None = None


class Upload(Protocol):
    """A push into one branch that this user may write to."""

    @property
    def revision(self) -> Revision: ...

    @property
    def page(self) -> str:
        """The address of the repository, for the user."""

    @property
    def pull_request(self) -> str | None:
        """The address of the push's pull request; None for a push to a branch."""

    @property
    def commits_together(self) -> bool:
        """True where one commit takes any number of files; False where each file is a commit."""

    def head(self) -> tuple[Repository, Listing]:
        """The branch at its present commit, and its listing. Raises HubError."""

    def begin(self, listing: Listing, note: bytes) -> None:
        """Commit `note` as npuq/unfinished.json and remove the manifest, so that no reader takes the branch for an
        artifact. Raises HubError."""

    def send(self, files: Sequence[LocalFile], progress: Progress) -> dict[str, NpuqError]:
        """Send and commit files; returns the failed ones with their errors. Content that the hub has is not sent."""

    def finish(self, contents: Mapping[FileName, bytes], removed: Sequence[FileName]) -> CommitId | None:
        """Commit contents, the manifest last, and remove files and the note; returns the last commit, None where the
        hub gives none. Raises HubError."""

    def tag(self, name: str, commit: CommitId | None) -> None:
        """Tag the result. HubError where the tag names another commit."""

    def publish(self) -> None:
        """Open a complete pull request, which was a draft. Raises HubError."""


class Hub(Protocol):
    """A hub and one of its repositories, with one user's access."""

    @property
    def repo(self) -> RepoId: ...

    @property
    def default_branch(self) -> Revision: ...

    def errors(self, doing: str) -> AbstractContextManager[None]:
        """Turn errors of the hub, the connection and the disk inside the context into a HubError of one line that
        begins with `doing` and holds no secret."""

    def locate(self, revision: Revision) -> Located:
        """Find a branch, a tag or a commit. Raises HubError."""

    def open_upload(self, *, private: bool | None, revision: str | None, create_pr: bool, title: str) -> Upload:
        """Check that the user may write, and make repository and branch where missing. Raises HubError."""


def open_hub(name: str, repo: str, token: str | None = None, backoff: Backoff | None = None) -> Hub:
    """Open the hub of this name (one of `choices.HUBS`) as the user of `token`; None: the client's own token.

    Raises HubError for another name, a malformed repository name, and a client that is not installed.
    """
    if name not in _HUBS:
        raise HubError(f"{name!r} is not a hub that npuq knows; give one of {', '.join(HUBS)}")
    module, kind = _HUBS[name]
    hub: Hub = getattr(import_module(module, __package__), kind)(repo, token, backoff)
    return hub
