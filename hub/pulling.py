"""`pull`: fetches an artifact, resumed inside files, every file checked by its hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ..choices import HUBS
from ..errors import HubError, NpuqError
from ..formats.artifact import DESCRIPTION_NAME, MANIFEST_NAME
from ..progress import Progress, Silent, Task
from .card import CARD
from .hub import Located, Place, Repository, open_hub
from .listing import Listing, Wanted, as_listed
from .manifest import MANIFEST, manifest_files
from .names import parse_revision
from .remote_state import UNFINISHED
from .transfer.download import mismatch
from .transfer.folder import FolderPlace, Source
from .transfer.parallel import in_order
from .transfer.retry import Backoff

_WORKERS: Final = 8
_WEIGHTS: Final = ".safetensors"

# Called with the directory before the weights are fetched; may raise an error against fetching them.
BeforeWeights = Callable[[Path], object]


def pull(
    repo: str,
    directory: str | Path | None = None,
    *,
    hub: str = HUBS[0],
    revision: str | None = None,
    token: str | None = None,
    before_weights: BeforeWeights = lambda directory: None,
    progress: Progress | None = None,
    backoff: Backoff | None = None,
) -> Path:
    """Fetch an artifact into the cache of the hub's client, or into `directory`; returns its directory.

    hub: "huggingface" or "modelscope". Present files are not fetched again, and a partial file continues at its end.
    Every file is checked against the manifest's sha256; the model card, which is not in the manifest, against the
    hub's. before_weights: called with the directory after all files but the weights, and may raise. HF_HUB_OFFLINE,
    HF_HOME and HF_TOKEN are honoured. Raises HubError.
    """
    there, progress = open_hub(hub, repo, token, backoff), progress or Silent()
    named = parse_revision(revision, there.default_branch)
    with there.errors(f"fetching {repo}"):
        located = there.locate(named)
        place = located.place if directory is None else FolderPlace(Path(directory), Source(there.repo, named))
        sealed, listing = find_manifest(located, place)
        if sealed is None:
            raise _no_artifact(repo, listing)
        return fetch_artifact(located, place, sealed, listing, progress, before_weights)


def find_manifest(located: Located, place: Place) -> tuple[bytes | None, Listing | None]:
    """Find the manifest of a revision's finished artifact, None without one, and the hub's listing, None where it was
    not needed."""
    sealed = located.place.manifest()
    if sealed is not None:
        return sealed, None
    if located.unanswered is not None:
        raise located.unanswered
    listing = located.repository.listing()
    if MANIFEST not in listing.files or UNFINISHED in listing.files:
        return None, listing
    return place.bring_manifest(located.repository, listing), listing


def fetch_artifact(
    located: Located,
    place: Place,
    sealed: bytes,
    listing: Listing | None,
    progress: Progress,
    before_weights: BeforeWeights,
) -> Path:
    """Fetch the missing files of a manifest's artifact, and its card; weights last. Raises HubError."""
    repository = located.repository
    missing = place.begin(sealed, manifest_files(repository.repo, sealed))
    if missing:
        if located.unanswered is not None:
            raise located.unanswered
        listing = listing or repository.listing()
        files = _matched(repository, missing, listing)
        if CARD in listing.files and listing.files[CARD].digest is not None:
            files.append(as_listed(repository.repo, CARD, listing))
        weights = [wanted for wanted in files if wanted.name.endswith(_WEIGHTS)]
        progress.start(Task("pull", total_bytes(files)))
        fetch_all(repository, place, [wanted for wanted in files if not wanted.name.endswith(_WEIGHTS)], progress)
        if weights:
            before_weights(place.directory)
        fetch_all(repository, place, weights, progress)
    # Last: a directory without its manifest is no artifact.
    return place.finish()


def fetch_all(repository: Repository, place: Place, files: Sequence[Wanted], progress: Progress) -> None:
    """Fetch files, several at a time; a failed one does not stop the others. Raises HubError."""

    def fetch(wanted: Wanted) -> None:
        try:
            place.fetch(repository, wanted, progress.advance)
        except OSError as error:
            raise repository.failure(f"{repository.repo}: {wanted.name}", error) from None

    failed: list[NpuqError] = []
    for _, error in in_order(files, fetch, _WORKERS):
        if isinstance(error, NpuqError):
            failed.append(error)
        elif error is not None:
            raise error
    place.remember()
    if failed:
        others = f" (and {len(failed) - 1} more files failed)" if len(failed) > 1 else ""
        raise type(failed[0])(f"{failed[0]}{others}")


def total_bytes(files: Sequence[Wanted]) -> int:
    """The size of these files together, in bytes."""
    return sum(wanted.size for wanted in files)


def _matched(repository: Repository, missing: Sequence[Wanted], listing: Listing) -> list[Wanted]:
    """Match missing files with the listing before anything is fetched. HubError for files that the hub lacks or lists
    with another hash."""
    result = []
    for wanted in missing:
        there = listing.files.get(wanted.name)
        if there is None:
            raise HubError(f"{repository.repo}: {wanted.name} is missing there; ask its owner to push again")
        if there.size != wanted.size:
            raise mismatch(repository, wanted.name, "size")
        if there.sha256 is not None and there.sha256 != wanted.digest:
            raise mismatch(repository, wanted.name)
        result.append(replace(wanted, listed=there.digest))
    return result


def _no_artifact(repo: str, listing: Listing | None) -> HubError:
    files = listing.files if listing is not None else {}
    if UNFINISHED in files:
        return HubError(
            f"{repo}: a push to it is not finished ({MANIFEST_NAME} comes with its last commit); "
            "push again to finish it, or give another --revision"
        )
    other = "; run `npuq convert` on what another tool has quantized" if DESCRIPTION_NAME in files else ""
    return HubError(f"{repo}: has no {MANIFEST_NAME}; it is not an artifact of npuq's{other}")
