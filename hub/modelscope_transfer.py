"""Push and pull for ModelScope.

Its client commits every file by itself and sends it in one piece. From that follows the order of a push: the old
manifest goes first, the weights come one by one, the small files after them, and the manifest last.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final
from urllib.parse import quote

from ..errors import HubError, NpuqError
from ..inputs.names import FileName
from ..quant.artifact import MANIFEST_NAME
from .client import Backoff, revision_of
from .download import read_whole
from .manifest import MANIFEST, MOST_MANIFEST_BYTES
from .modelscope import ModelScope, ScopeRepository
from .names import Revision
from .place import FolderPlace, Source
from .progress import Silent, TransferProgress
from .pulling import CARD, fetch_artifact, manifest_files
from .pushing import PushSummary, default_title, local_files, merged_card
from .remote_state import UNFINISHED, previous_files, refuse_strays
from .repository import Listing, RemoteFile
from .upload import LocalFile, not_sent

_MAIN: Final = "master"


def push_modelscope(
    artifact: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    tag: str | None = None,
    token: str | None = None,
    verify: Callable[[Path], None] | None = None,
    progress: TransferProgress | None = None,
    backoff: Backoff | None = None,
) -> PushSummary:
    """Push an artifact to a ModelScope repository, continuing what an earlier push did; arguments as of `push`.

    `revision` must be a branch that is there: the client makes none. A file that fails stops no other weight. Raises
    ArtifactError and HubError as `push` does.
    """
    artifact, progress, branch = Path(artifact), progress or Silent(), revision_of(revision, _MAIN)
    scope, title = ModelScope(repo, token, backoff), message or default_title(artifact)
    files, sealed = local_files(artifact)
    scope.open_or_make(private)
    if verify is not None:
        verify(artifact)
    repository = ScopeRepository(scope, branch)
    listing = repository.listing()
    previous = previous_files(repository, listing)
    refuse_strays(repo, listing, {*files, *previous})
    card = merged_card(repository, artifact, listing)
    changed = [file for file in files.values() if not _is_there(file, listing.files.get(file.name))]
    texts = {name: text for name, text in card.items() if not _holds(listing, name, text)}
    stale = sorted((previous - files.keys() - {MANIFEST, CARD}) | ({UNFINISHED} & listing.files.keys()))
    seal = bool(changed or stale) or not _holds(listing, MANIFEST, sealed)
    sent_bytes = sum(file.size for file in changed) + sum(map(len, texts.values())) + seal * len(sealed)
    progress.start(sent_bytes)
    if changed or stale:
        _begin(scope, listing, [*files, *previous], branch, title)
        _send(scope, changed, branch, title, progress)
    for name, text in texts.items():
        scope.put(name, text, branch, title)
        progress.advance(len(text))
    if seal:
        _refuse_unlike(repository, files)
        scope.put(MANIFEST, sealed, branch, title)
        progress.advance(len(sealed))
    if changed or stale:
        scope.remove(sorted({*stale, UNFINISHED}), branch, title)
    if tag is not None:
        scope.tag(tag, branch)
    return PushSummary(
        repo=repo,
        revision=branch,
        commit="",
        url=f"{scope.endpoint}/models/{repo}",
        files=len({*files, MANIFEST, *card}),
        sent_files=len(changed) + len(texts) + seal,
        sent_bytes=sent_bytes,
        pull_request=None,
    )


def pull_modelscope(
    repo: str,
    directory: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    progress: TransferProgress | None = None,
    backoff: Backoff | None = None,
) -> Path:
    """Fetch an artifact from ModelScope into `directory`, or into a folder of its client's cache; returns where it is.

    Every file is checked against the manifest's sha256, and one that was cut off goes on where it ended. The manifest
    comes last. Raises HubError.
    """
    scope, branch, progress = ModelScope(repo, token, backoff), revision_of(revision, _MAIN), progress or Silent()
    repository = ScopeRepository(scope, branch)
    listing = repository.listing()
    if MANIFEST not in listing.files or UNFINISHED in listing.files:
        raise HubError(
            f"{repo}: has no finished artifact in {branch!r} ({MANIFEST_NAME} comes with the last commit of a push); "
            "push again to finish it, or give another --revision"
        )
    sealed = read_whole(repository, MANIFEST, listing.files[MANIFEST], MOST_MANIFEST_BYTES)
    wanted = manifest_files(repo, sealed)
    target = _cache_folder(scope, branch) if directory is None else Path(directory)
    try:
        names = [file.name for file in wanted]
        place = FolderPlace(target, Source(scope.repo, branch), sealed, names, follows=directory is None)
        missing = place.missing(wanted)
        if missing:
            fetch_artifact(repository, listing, place, missing, progress)
        return place.finish()
    except OSError as error:
        raise scope.failure(f"fetching {repo}", error) from None


def _cache_folder(scope: ModelScope, branch: Revision) -> Path:
    # Escaped, not replaced: ModelScope allows `--` in all of these names.
    return Path(scope.config.cache_dir) / "npuq" / scope.repo / quote(branch, safe="")


def _begin(scope: ModelScope, listing: Listing, names: list[FileName], branch: Revision, title: str) -> None:
    """No reader may take the mixture that follows for an artifact."""
    if UNFINISHED not in listing.files:
        note = json.dumps({"replaces": sorted({*names, MANIFEST})}).encode()
        scope.put(UNFINISHED, note, branch, title)
    if MANIFEST in listing.files:
        scope.remove([MANIFEST], branch, title)


def _send(
    scope: ModelScope, files: Sequence[LocalFile], branch: Revision, title: str, progress: TransferProgress
) -> None:
    """The weights first, then what gives them a meaning. One at a time: each is a commit to the same branch."""
    failed: dict[str, NpuqError] = {}
    for file in sorted(files, key=lambda file: not file.name.endswith(".safetensors")):
        try:
            scope.put(file.name, file.path, branch, title)
        except HubError as error:
            progress.note(f"{file.name} was not sent: {error}; going on with the others")
            failed[file.name] = error
        progress.advance(file.size)
    if failed:
        raise not_sent(failed, len(files))


def _refuse_unlike(repository: ScopeRepository, files: Mapping[FileName, LocalFile]) -> None:
    """Before the manifest vouches for them: what was sent is what it says, also where a file changed meanwhile."""
    listing = repository.listing()
    for file in files.values():
        if not _is_there(file, listing.files.get(file.name)):
            raise HubError(f"{file.path}: ModelScope lists other content than the manifest has; run `npuq verify`")


def _is_there(file: LocalFile, remote: RemoteFile | None) -> bool:
    return remote is not None and remote.size == file.size and remote.sha256 == file.sha256


def _holds(listing: Listing, name: FileName, text: bytes) -> bool:
    return name in listing.files and listing.files[name].holds(text)
