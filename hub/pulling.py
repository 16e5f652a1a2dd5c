"""`pull`: a repository comes to this machine, resumed inside files, every file checked by its hash."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ..errors import HubError, NpuqError
from ..quant.artifact import CARD_NAME, DESCRIPTION_NAME, FORMAT_VERSION, MANIFEST_NAME
from ..quant.checkpoint import CONFIG_NAME
from .client import Backoff, Hub, is_transient
from .fetch import Wanted, mismatch
from .parallel import in_order
from .place import CachePlace, FolderPlace, Place
from .progress import Silent, TransferProgress
from .remote_state import UNFINISHED_NAME, RemoteFile, list_files

WORKERS = 8
# What an unquantized checkpoint is made of; other weight formats and pictures stay where they are.
_CHECKPOINT_FILES = (
    "*.safetensors", "*.json", "tokenizer*", "*.tiktoken", "*.model", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*"
)  # fmt: skip


def pull(
    repo: str,
    directory: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    artifact_only: bool = True,
    progress: TransferProgress | None = None,
    backoff: Backoff | None = None,
) -> Path:
    """Fetch an artifact into the Hugging Face cache, or into `directory`; returns where it is.

    What is there already is not fetched again, and a file that was cut off goes on where it ended. Every file is
    checked against the manifest's sha256; the model card is not in the manifest and comes as it is. With
    `artifact_only` false an unquantized checkpoint is fetched too, its weights checked against the hub's hashes.
    HF_HUB_OFFLINE, HF_HOME and HF_TOKEN are honoured. Raises HubError.
    """
    hub, progress = Hub(repo, token, backoff), progress or Silent()
    with hub.errors(f"fetching {repo}"):
        manifest_path = _fetch_manifest(hub, revision, artifact_only)
        if manifest_path is None:
            return _pull_checkpoint(hub, revision, progress)
        commit = manifest_path.parents[1].name
        wanted = manifest_files(repo, manifest_path.read_bytes())
        place: Place = CachePlace(hub, commit)
        if directory is not None:
            place = FolderPlace(hub, commit, Path(directory), manifest_path)
        missing = place.missing(wanted)
        if missing:
            remote = list_files(hub, commit)
            _refuse_other_content(hub, missing, remote)
            _fetch_all(hub, place, missing, progress)
            if CARD_NAME in remote:
                place.fetch_unchecked(CARD_NAME)
        # Last: a directory without its manifest is no artifact.
        return place.finish(manifest_path)


def _fetch_manifest(hub: Hub, revision: str | None, artifact_only: bool) -> Path | None:
    """The manifest in the cache (snapshots/COMMIT/npuq/manifest.json); None for an unquantized checkpoint."""

    def download() -> Path | None:
        try:
            return Path(hub.api.hf_hub_download(hub.repo, MANIFEST_NAME, revision=revision))
        except LocalEntryNotFoundError:
            # Nobody can say whether the hub has one. A checkpoint that was fetched before has none.
            if artifact_only or _cached_checkpoint(hub, revision) is None:
                raise
            return None
        except EntryNotFoundError:
            return None
        except Exception as error:
            # As the client does when nobody answers: what was fetched before is better than nothing.
            cached = _cached_manifest(hub, revision) if is_transient(error) else None
            if cached is None:
                raise
            return cached

    path = hub.call(f"fetching {hub.repo}", download, attempts=2)
    if path is None and artifact_only:
        remote = list_files(hub, revision or "main")
        if UNFINISHED_NAME in remote:
            raise HubError(
                f"{hub.repo}: a push to it is not finished ({MANIFEST_NAME} comes with its last commit); "
                "push again to finish it, or give another --revision"
            )
        other = "; run `npuq convert` on what another tool has quantized" if DESCRIPTION_NAME in remote else ""
        raise HubError(f"{hub.repo}: has no {MANIFEST_NAME}; it is not an artifact of npuq's{other}")
    return path


def manifest_files(repo: str, content: bytes) -> list[Wanted]:
    """What a manifest that came from `repo` lists. HubError for what is none, or could write outside the artifact."""
    try:
        manifest = json.loads(content)
        version = manifest["format_version"]
    except (ValueError, KeyError, TypeError):
        raise HubError(f"{repo}: {MANIFEST_NAME} is no artifact's manifest; ask its owner to push again") from None
    if version != FORMAT_VERSION:
        raise HubError(f"{repo}: artifact format {version!r}; this npuq knows {FORMAT_VERSION}: use another npuq")
    wanted = []
    try:
        for name, entry in manifest["files"].items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise HubError(f"{repo}: {MANIFEST_NAME} names {name!r}, outside the artifact; refusing it")
            wanted.append(Wanted(name, int(entry["size"]), str(entry["sha256"])))
    except (KeyError, TypeError, ValueError, AttributeError):
        raise HubError(f"{repo}: {MANIFEST_NAME} lists no files; ask its owner to push again") from None
    return wanted


def _refuse_other_content(hub: Hub, missing: Sequence[Wanted], remote: Mapping[str, RemoteFile]) -> None:
    """Before anything is fetched: files that the hub lacks or holds with another hash."""
    for wanted in missing:
        there = remote.get(wanted.name)
        if there is None:
            raise HubError(f"{hub.repo}: {wanted.name} is missing there; ask its owner to push again")
        if there.size != wanted.size or (there.sha256 is not None and there.sha256 != wanted.sha256):
            raise mismatch(hub, wanted.name)


def _fetch_all(hub: Hub, place: Place, missing: Sequence[Wanted], progress: TransferProgress) -> None:
    """Fetch several files at a time; one that fails does not keep the others from coming."""
    progress.start(sum(wanted.size for wanted in missing))
    failed: dict[str, NpuqError] = {}
    for wanted, error in in_order(missing, lambda wanted: _fetch(hub, place, wanted, progress), WORKERS):
        if isinstance(error, NpuqError):
            failed[wanted.name] = error
        elif error is not None:
            raise error
    place.remember()
    if failed:
        first = next(iter(failed.values()))
        others = f" (and {len(failed) - 1} more files failed)" if len(failed) > 1 else ""
        raise HubError(f"{first}{others}")


def _fetch(hub: Hub, place: Place, wanted: Wanted, progress: TransferProgress) -> None:
    with hub.errors(f"{hub.repo}: {wanted.name}"):
        place.fetch(wanted, progress.advance)


def _pull_checkpoint(hub: Hub, revision: str | None, progress: TransferProgress) -> Path:
    """An unquantized checkpoint, into the cache."""
    try:
        commit = hub.call(f"fetching {hub.repo}", lambda: hub.api.repo_info(hub.repo, revision=revision).sha)
    except HubError:
        cached = _cached_checkpoint(hub, revision)
        if cached is None:
            raise
        return cached
    remote = list_files(hub, str(commit))
    names = [name for name in remote if any(fnmatchcase(name, pattern) for pattern in _CHECKPOINT_FILES)]
    if UNFINISHED_NAME in remote or CONFIG_NAME not in remote:
        raise HubError(
            f"{hub.repo}: neither a finished artifact ({MANIFEST_NAME}) nor a checkpoint ({CONFIG_NAME} and weights)"
        )
    place = CachePlace(hub, str(commit))
    wanted = [Wanted(name, remote[name].size, remote[name].sha256) for name in sorted(names) if "/" not in name]
    missing = place.missing(wanted)
    if missing:
        _fetch_all(hub, place, missing, progress)
    place.refer(revision)
    return place.directory


def _cached_manifest(hub: Hub, revision: str | None) -> Path | None:
    try:
        return Path(hub.api.hf_hub_download(hub.repo, MANIFEST_NAME, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _cached_checkpoint(hub: Hub, revision: str | None) -> Path | None:
    try:
        folder = Path(hub.api.snapshot_download(hub.repo, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if (folder / CONFIG_NAME).is_file() else None
