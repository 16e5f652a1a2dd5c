"""`push`: an artifact goes to a repository, in commits that a killed push can be continued from.

The first commit takes the old manifest away and says that a push is under way; then come the weights, one after
another; the last commit brings the small files and the manifest. Content that the hub has already is never sent again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete

from ..errors import ArtifactError, HubError
from ..quant.artifact import CARD_NAME, MANIFEST_NAME, read_manifest
from .card import merge_card
from .client import Backoff, Hub
from .commits import Committer
from .progress import Silent, TransferProgress
from .remote_state import (
    UNFINISHED_NAME,
    RemoteFile,
    list_files,
    previous_files,
    read_small_file,
    refuse_strays,
)
from .target import Target, open_target
from .upload import LocalFile, upload_all

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
    manifest = read_manifest(artifact)
    files = local_files(artifact, manifest)
    target = open_target(hub, private, revision, create_pr, title)
    if verify is not None:
        verify(artifact)
    remote = list_files(hub, target.revision)
    previous = previous_files(hub, remote, target.revision)
    refuse_strays(repo, remote, {*files, *previous})
    texts = {MANIFEST_NAME: (artifact / MANIFEST_NAME).read_bytes(), **_card(hub, artifact, remote, target)}
    changed = [file for name, file in files.items() if not _is_there(file, remote.get(name))]
    count = len({*files, *texts})
    texts = {name: text for name, text in texts.items() if not _holds_text(remote.get(name), text)}
    stale = sorted(previous - files.keys() - {MANIFEST_NAME, CARD_NAME})
    committer = Committer(hub, target, title)
    commit = _send(committer, files, changed, texts, stale, remote, progress)
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


def local_files(artifact: Path, manifest: Mapping[str, Any]) -> dict[str, LocalFile]:
    """What the manifest lists, in order. ArtifactError when a file is gone or has another size."""
    files = {}
    for name, entry in manifest["files"].items():
        path = artifact / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ArtifactError(f"{MANIFEST_NAME}: names {name!r}, outside the artifact")
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise ArtifactError(f"{path}: is not as the manifest has it; run `npuq verify {artifact}`")
        files[name] = LocalFile(name, path, entry["size"], entry["sha256"])
    return files


def _send(
    committer: Committer,
    files: Mapping[str, LocalFile],
    changed: list[LocalFile],
    texts: Mapping[str, bytes],
    stale: list[str],
    remote: Mapping[str, RemoteFile],
    progress: TransferProgress,
) -> str:
    progress.start(sum(file.size for file in changed) + sum(map(len, texts.values())))
    if not changed and not texts and not stale and UNFINISHED_NAME not in remote:
        return committer.head()
    large = [file for file in changed if file.size > _SMALL_BYTES]
    if large:
        committer.begin(remote, [*files, *texts])
    failed = upload_all(committer, large, progress)
    if failed:
        names = ", ".join(failed)
        first = next(iter(failed.values()))
        raise HubError(f"{len(failed)} of {len(large)} files were not sent ({names}); push again to continue. {first}")
    small = [file for file in changed if file.size <= _SMALL_BYTES]
    # From memory: what is committed is what was hashed here.
    contents = {file.name: file.checked_content() for file in small}
    operations = [CommitOperationAdd(name, content) for name, content in {**contents, **texts}.items()]
    deletions = [CommitOperationDelete(name) for name in stale if name != UNFINISHED_NAME]
    commit = committer.finish(operations, deletions)
    progress.advance(sum(map(len, [*contents.values(), *texts.values()])))
    return commit


def _is_there(file: LocalFile, remote: RemoteFile | None) -> bool:
    if remote is None or remote.size != file.size:
        return False
    content = file.checked_content() if remote.sha256 is None else None
    return remote.holds(file.size, file.sha256, content)


def _holds_text(remote: RemoteFile | None, text: bytes) -> bool:
    return remote is not None and remote.holds(len(text), hashlib.sha256(text).hexdigest(), text)


def _card(hub: Hub, artifact: Path, remote: Mapping[str, RemoteFile], target: Target) -> dict[str, bytes]:
    path = artifact / CARD_NAME
    if not path.is_file():
        return {}
    existing = read_small_file(hub, CARD_NAME, target.revision) if CARD_NAME in remote else None
    try:
        theirs = None if existing is None else existing.decode("utf-8")
        card = merge_card(theirs, path.read_text(encoding="utf-8"), hub.repo)
    except UnicodeDecodeError:
        raise HubError(
            f"{CARD_NAME} in {hub.repo} or in {artifact} is not UTF-8 text; repair it, then push again"
        ) from None
    return {CARD_NAME: card.encode()}


def default_title(artifact: Path) -> str:
    """The title of the commits where no message is given."""
    return f"Upload {artifact.resolve().name} with npuq"


def _tag(hub: Hub, tag: str, commit: str) -> None:
    doing = f"tagging {hub.repo} as {tag!r}"

    def existing() -> dict[str, str]:
        return {ref.name: ref.target_commit for ref in hub.api.list_repo_refs(hub.repo).tags}

    before = hub.call(doing, existing).get(tag)
    if before == commit:
        return
    if before is not None:
        raise HubError(f"{doing}: the tag exists and means {before[:12]}; the push itself is done: choose another tag")
    hub.call(doing, lambda: hub.api.create_tag(hub.repo, tag=tag, revision=commit, exist_ok=True))
