"""`push`: sends an artifact to a repository, in commits from which a killed push can continue.

The old manifest is removed first and the new one sent last, so that no reader gets a mixture. Content that the hub has
is never sent again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..choices import HUBS
from ..errors import ArtifactError, HubError
from ..inputs.files import inside, is_inside, read_text
from ..inputs.names import FileName
from ..progress import Progress, Silent, Task
from .card import CARD, merge_card
from .hub import Repository, Upload, open_hub
from .listing import Listing
from .local_files import LocalFile, local_files, not_sent
from .manifest import MANIFEST
from .names import CommitId, RepoId, parse_repo
from .remote_state import UNFINISHED, previous_files, refuse_strays, unfinished_note
from .transfer.download import read_whole
from .transfer.retry import Backoff

_MOST_CARD_BYTES: Final = 8 << 20
# Smaller files are part of the last commit: a README or an index is useless without the weights.
_SMALL_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class PushSummary:
    """The result of a push. `sent_bytes` is the size of the files that the hub lacked; `commit` is the last commit's
    hash, empty where the hub gives none."""

    repo: str
    revision: str
    commit: str
    url: str
    files: int
    sent_files: int
    sent_bytes: int
    pull_request: str | None

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON's types."""
        return dict(vars(self))


def push(
    artifact: str | Path,
    repo: str,
    *,
    hub: str = HUBS[0],
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    base_model: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: str | None = None,
    verify: Callable[[Path], None] | None = None,
    progress: Progress | None = None,
    backoff: Backoff | None = None,
) -> PushSummary:
    """Push an artifact directory to `repo` (made where missing), continuing an earlier push.

    hub: "huggingface" or "modelscope". revision: a branch, made from main where missing. create_pr: open a pull request
    instead, or continue this user's open one of the same title. ModelScope has neither. tag: a tag for the result.
    base_model: the source's name on the hub, for the card. verify: called with the directory first; raises its faults.
    token: by default that of the hub's own client (HF_TOKEN, `hf auth login`). An existing README.md keeps its text
    around npuq's own section.

    Raises ArtifactError for a directory that is no finished artifact, HubError for the hub's refusals and for files
    that failed; all others are sent even then, and pushing again continues.
    """
    artifact, progress = Path(artifact), progress or Silent()
    there, title = open_hub(hub, repo, token, backoff), message or default_title(artifact)
    base = None if base_model is None else parse_repo(base_model, RepoId)
    files, sealed = local_files(artifact)
    with there.errors(f"pushing to {repo}"):
        upload = there.open_upload(private=private, revision=revision, create_pr=create_pr, title=title)
        if verify is not None:
            verify(artifact)
        repository, listing = upload.head()
        card = merged_card(repository, artifact, listing, base)
        work = _plan(repository, listing, files, {**card, MANIFEST: sealed}, together=upload.commits_together)
        progress.start(Task("push", work.sent_bytes))
        commit = repository.commit if work.is_done else _send(upload, listing, work, progress)
        if tag is not None:
            upload.tag(tag, commit)
        upload.publish()
    return PushSummary(
        repo=repo,
        revision=upload.revision,
        commit=commit or "",
        url=upload.page,
        files=len({*files, *card, MANIFEST}),
        sent_files=len(work.changed) + len(work.texts),
        sent_bytes=work.sent_bytes,
        pull_request=upload.pull_request,
    )


def default_title(artifact: Path) -> str:
    """The title of the commits of a push without a message."""
    return f"Upload {artifact.resolve().name} with npuq"


def merged_card(
    repository: Repository, artifact: Path, listing: Listing, base_model: RepoId | None = None
) -> dict[FileName, bytes]:
    """Merge the artifact's card into the repository's; empty for an artifact without a card."""
    if not is_inside(artifact, CARD):
        return {}
    ours = read_text(inside(artifact, CARD, ArtifactError), ArtifactError, _MOST_CARD_BYTES)
    theirs = None
    if CARD in listing.files:
        content = read_whole(repository, CARD, listing.files[CARD], _MOST_CARD_BYTES)
        try:
            theirs = content.decode("utf-8")
        except UnicodeDecodeError:
            raise HubError(f"{CARD} in {repository.repo} is not UTF-8 text; repair it, then push again") from None
    return {CARD: merge_card(theirs, ours, repository.repo, base_model).encode()}


@dataclass(frozen=True)
class _Work:
    """The work of a push: `large` files among the `changed` ones get commits of their own; the last commit adds the
    others and `texts` (the card, the manifest) and removes `stale` files. `note` lists all files for a continuing
    push."""

    changed: list[LocalFile]
    large: list[LocalFile]
    texts: dict[FileName, bytes]
    stale: list[FileName]
    note: bytes
    begins: bool
    was_unfinished: bool

    @property
    def sent_bytes(self) -> int:
        return sum(file.size for file in self.changed) + sum(map(len, self.texts.values()))

    @property
    def is_done(self) -> bool:
        return not (self.changed or self.texts or self.stale or self.was_unfinished)


def _plan(
    repository: Repository,
    listing: Listing,
    files: dict[FileName, LocalFile],
    texts: dict[FileName, bytes],
    *,
    together: bool,
) -> _Work:
    previous = previous_files(repository, listing)
    refuse_strays(repository.repo, listing, {*files, *previous})
    changed = [file for file in files.values() if not file.is_in(listing)]
    large = [file for file in changed if not together or file.size > _SMALL_BYTES]
    stale = sorted(previous - files.keys() - {MANIFEST, CARD, UNFINISHED})
    # Between several commits no reader may take the mixture for an artifact.
    begins = bool(large or (stale and not together))
    sent = {
        name: text
        for name, text in texts.items()
        if not listing.holds(name, text) or (begins and name == MANIFEST)  # which the first commit removes
    }
    note = unfinished_note([*previous, *files, *texts])
    return _Work(changed, large, sent, stale, note, begins, UNFINISHED in listing.files)


def _send(upload: Upload, listing: Listing, work: _Work, progress: Progress) -> CommitId | None:
    if work.begins:
        upload.begin(listing, work.note)
    failed = upload.send(work.large, progress) if work.large else {}
    if failed:
        raise not_sent(failed, len(work.large))
    # From memory, so that the committed bytes are the hashed ones.
    large = {*work.large}
    small = {file.name: file.checked_content() for file in work.changed if file not in large}
    commit = upload.finish({**small, **work.texts}, work.stale)
    progress.advance(sum(map(len, [*small.values(), *work.texts.values()])))
    return commit
