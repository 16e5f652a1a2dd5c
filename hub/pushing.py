"""`push`: an artifact goes to a repository, in commits that a killed push can be continued from.

The first commit takes the old manifest away and says that a push is under way; then come the weights, one after
another; the last commit brings the small files and the manifest. Content that the hub has already is never sent again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError, HubError
from ..inputs.files import inside, is_inside, read_bytes, read_text
from ..inputs.names import FileName, Sha256
from ..inputs.printable import printable
from ..quant.artifact import read_manifest
from .card import merge_card
from .client import Backoff, Hub
from .commits import Committer
from .download import read_whole
from .huggingface import HubRepository, list_branch
from .lfs import Addition
from .manifest import MANIFEST, MOST_MANIFEST_BYTES
from .names import CommitId
from .progress import Silent, TransferProgress
from .pulling import CARD, manifest_files
from .remote_state import MOST_CARD_BYTES, UNFINISHED, previous_files, refuse_strays
from .repository import Listing, RemoteFile, Repository
from .target import open_target
from .upload import LocalFile, not_sent, upload_all

# Smaller files travel with the last commit: a README or an index without its weights is of no use to a reader.
_SMALL_BYTES = 1 << 20


@dataclass(frozen=True)
class PushSummary:
    """What a push did. `sent_bytes` counts the files that were not on the hub; `commit` is the last one's hash."""

    repo: str
    revision: str
    commit: str
    url: str
    files: int
    sent_files: int
    sent_bytes: int
    pull_request: str | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dict(vars(self))


def push(
    artifact: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    tag: str | None = None,
    token: str | None = None,
    verify: Callable[[Path], None] | None = None,
    progress: TransferProgress | None = None,
    backoff: Backoff | None = None,
) -> PushSummary:
    """Push an artifact directory to `repo` (created where it does not exist), continuing what an earlier push did.

    `revision` is a branch, made from main where it does not exist; `create_pr` opens a pull request instead (or goes on
    with this user's open one of the same title); `tag` names the result. `verify` is called with the directory first
    and raises what is wrong with it. `token` defaults to the ecosystem's (HF_TOKEN, `hf auth login`). A README.md that
    is there keeps its text around npuq's own section.

    Raises ArtifactError for a directory that is no finished artifact, HubError for what the hub refuses and for files
    that could not be sent; all others are sent then, and pushing again continues.
    """
    artifact, progress = Path(artifact), progress or Silent()
    hub, title = Hub(repo, token, backoff), message or default_title(artifact)
    files, sealed = local_files(artifact)
    target = open_target(hub, private, revision, create_pr, title)
    if verify is not None:
        verify(artifact)
    repository, listing = list_branch(hub, target.revision)
    previous = previous_files(repository, listing)
    refuse_strays(repo, listing, {*files, *previous})
    texts = {MANIFEST: sealed, **merged_card(repository, artifact, listing)}
    count = len({*files, *texts})
    changed = [file for name, file in files.items() if not _is_there(file, listing.files.get(name))]
    texts = {name: text for name, text in texts.items() if not _holds_text(listing.files.get(name), text)}
    stale = sorted(previous - files.keys() - {MANIFEST, CARD, UNFINISHED})
    commit = _send(Committer(hub, target, title), repository, listing, files, changed, texts, stale, progress)
    if tag is not None:
        _tag(hub, tag, commit)
    target.finish(hub)
    return PushSummary(
        repo=repo,
        revision=target.revision,
        commit=commit,
        url=f"{hub.api.endpoint}/{repo}",
        files=count,
        sent_files=len(changed) + len(texts),
        sent_bytes=sum(file.size for file in changed) + sum(map(len, texts.values())),
        pull_request=target.pull_request,
    )


def local_files(artifact: Path) -> tuple[dict[FileName, LocalFile], bytes]:
    """What the manifest lists, in order, and the manifest itself. ArtifactError when a file is gone or has another
    size, and for a directory that is no finished artifact."""
    read_manifest(artifact)
    sealed = read_bytes(inside(artifact, MANIFEST, ArtifactError), ArtifactError, MOST_MANIFEST_BYTES)
    files = {}
    for listed in manifest_files(str(artifact), sealed, ArtifactError):
        path = inside(artifact, listed.name, ArtifactError)
        if path.stat().st_size != listed.size:
            raise ArtifactError(f"{path}: is not as the manifest has it; run `npuq verify {artifact}`")
        files[listed.name] = LocalFile(listed.name, path, listed.size, Sha256(listed.digest))
    return files, sealed


def merged_card(repository: Repository, artifact: Path, listing: Listing) -> dict[FileName, bytes]:
    """The artifact's card merged into the repository's; empty for an artifact that has none."""
    if not is_inside(artifact, CARD):
        return {}
    ours = read_text(inside(artifact, CARD, ArtifactError), ArtifactError, MOST_CARD_BYTES)
    theirs = None
    if CARD in listing.files:
        content = read_whole(repository, CARD, listing.files[CARD], MOST_CARD_BYTES)
        try:
            theirs = content.decode("utf-8")
        except UnicodeDecodeError:
            raise HubError(f"{CARD} in {repository.repo} is not UTF-8 text; repair it, then push again") from None
    return {CARD: merge_card(theirs, ours, repository.repo).encode()}


def _send(
    committer: Committer,
    repository: HubRepository,
    listing: Listing,
    files: Mapping[FileName, LocalFile],
    changed: Sequence[LocalFile],
    texts: Mapping[FileName, bytes],
    stale: Sequence[FileName],
    progress: TransferProgress,
) -> CommitId:
    progress.start(sum(file.size for file in changed) + sum(map(len, texts.values())))
    if not changed and not texts and not stale and UNFINISHED not in listing.files:
        return repository.commit
    large = [file for file in changed if file.size > _SMALL_BYTES]
    if large:
        committer.begin(repository, listing, [*files, *texts])
    failed = upload_all(committer, large, progress)
    if failed:
        raise not_sent(failed, len(large))
    # From memory: what is committed is what was hashed here.
    small = {file.name: file.checked_content() for file in changed if file.size <= _SMALL_BYTES}
    additions = [Addition.of(name, content) for name, content in {**small, **texts}.items()]
    commit = committer.finish(additions, stale)
    progress.advance(sum(map(len, [*small.values(), *texts.values()])))
    return commit


def _is_there(file: LocalFile, remote: RemoteFile | None) -> bool:
    if remote is None or remote.size != file.size:
        return False
    return remote.sha256 == file.sha256 if remote.sha256 is not None else remote.holds(file.checked_content())


def _holds_text(remote: RemoteFile | None, text: bytes) -> bool:
    return remote is not None and remote.holds(text)


def default_title(artifact: Path) -> str:
    """The title of the commits where no message is given."""
    return f"Upload {artifact.resolve().name} with npuq"


def _tag(hub: Hub, tag: str, commit: CommitId) -> None:
    doing = f"tagging {hub.repo} as {tag!r}"

    def existing() -> dict[str, str]:
        return {ref.name: ref.target_commit for ref in hub.api.list_repo_refs(hub.repo).tags}

    before = hub.call(doing, existing).get(tag)
    if before == commit:
        return
    if before is not None:
        means = printable(str(before))[:12]
        raise HubError(f"{doing}: the tag exists and means {means}; the push itself is done: choose another tag")
    hub.call(doing, lambda: hub.api.create_tag(hub.repo, tag=tag, revision=commit, exist_ok=True))
