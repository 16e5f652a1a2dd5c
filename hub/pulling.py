"""`pull`: a repository comes to this machine, resumed inside files, every file checked by its hash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import CheckpointError, HubError, NpuqError
from ..inputs.files import read_bytes
from ..inputs.json_text import parse_object
from ..inputs.names import FileName, Sha256
from ..quant.artifact import CARD_NAME, DESCRIPTION_NAME, FORMAT_VERSION, MANIFEST_NAME
from ..quant.checkpoint import CONFIG_NAME, read_weight_map, single_file
from ..quant.side_files import is_read_beside_weights
from .client import Backoff, Hub, revision_of
from .download import read_whole
from .faults import OfflineError, PassingError
from .fetch import Wanted, mismatch
from .huggingface import HubRepository, resolve_commit
from .manifest import MANIFEST, MOST_MANIFEST_BYTES
from .names import CommitId, Revision, byte_count
from .parallel import in_order
from .partial import PARTIAL_SUFFIX
from .place import CachePlace, FolderPlace, Place, Source, cached_commit
from .progress import Silent, TransferProgress
from .remote_state import UNFINISHED
from .repository import Listing, Repository

WORKERS = 8
CONFIG = FileName(CONFIG_NAME)
CARD = FileName(CARD_NAME)
_WEIGHTS = ".safetensors"

# Given the directory with everything but the weights in it; raises what speaks against fetching those.
BeforeWeights = Callable[[Path], object]


def pull(
    repo: str,
    directory: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
    artifact_only: bool = True,
    before_weights: BeforeWeights = lambda directory: None,
    progress: TransferProgress | None = None,
    backoff: Backoff | None = None,
) -> Path:
    """Fetch an artifact into the Hugging Face cache, or into `directory`; returns where it is.

    What is there already is not fetched again, and a file that was cut off goes on where it ended. Every file is
    checked against the manifest's sha256; the model card, which is not in the manifest, against the hub's. With
    `artifact_only` false an unquantized checkpoint is fetched too, checked against the hub's hashes.
    `before_weights` is called with the directory when all but the weights is there, and may raise. HF_HUB_OFFLINE,
    HF_HOME and HF_TOKEN are honoured. Raises HubError.
    """
    hub, progress, named = Hub(repo, token, backoff), progress or Silent(), revision_of(revision)
    with hub.errors(f"fetching {repo}"):
        commit, unanswered = _commit(hub, named)
        repository, place = HubRepository(hub, commit), CachePlace(hub.repo, commit)
        listing: Listing | None = None
        if not place.is_intact(MANIFEST):
            if unanswered is not None:
                # Nobody can say whether it has a manifest. A checkpoint that was fetched before has none.
                if artifact_only or directory is not None or not (place.directory / CONFIG).is_file():
                    raise unanswered
                return place.directory
            listing = repository.listing()
            if MANIFEST not in listing.files:
                if artifact_only:
                    raise _no_artifact(hub.repo, listing)
                return _pull_checkpoint(repository, listing, place, named, before_weights, progress)
            if directory is None:
                place.fetch(repository, as_listed(hub.repo, MANIFEST, listing), lambda count: None)
        if listing is None or directory is None:
            sealed = read_bytes(place.directory / MANIFEST, HubError, MOST_MANIFEST_BYTES)
        else:
            # Into a folder: nothing of it goes into the cache.
            sealed = read_whole(repository, MANIFEST, listing.files[MANIFEST], MOST_MANIFEST_BYTES)
        wanted = manifest_files(hub.repo, sealed)
        target: Place = place
        if directory is not None:
            target = FolderPlace(Path(directory), Source(hub.repo, named), sealed, [file.name for file in wanted])
        missing = target.missing(wanted)
        if missing:
            if unanswered is not None:
                raise unanswered
            fetch_artifact(repository, listing or repository.listing(), target, missing, progress, before_weights)
        if directory is None:
            place.refer(named)
        # Last: a directory without its manifest is no artifact.
        return target.finish()


def _commit(hub: Hub, named: Revision) -> tuple[CommitId, HubError | None]:
    """The commit that is meant; where nobody answers, the one that it was when it was last fetched, and why nobody
    does: asking again would make the user wait for nothing."""
    if CommitId.holds(named):
        return CommitId(named), None
    cached = cached_commit(hub.repo, named)
    try:
        return resolve_commit(hub, named, attempts=None if cached is None else 2), None
    except (PassingError, OfflineError) as error:
        # As the client does: what was fetched before is better than nothing.
        if cached is None:
            raise
        return cached, error


def _no_artifact(repo: str, listing: Listing) -> HubError:
    if UNFINISHED in listing.files:
        return HubError(
            f"{repo}: a push to it is not finished ({MANIFEST_NAME} comes with its last commit); "
            "push again to finish it, or give another --revision"
        )
    other = "; run `npuq convert` on what another tool has quantized" if DESCRIPTION_NAME in listing.files else ""
    return HubError(f"{repo}: has no {MANIFEST_NAME}; it is not an artifact of npuq's{other}")


def manifest_files(repo: str, content: bytes, error: type[NpuqError] = HubError) -> list[Wanted]:
    """What a manifest that came from `repo` lists. Raises `error` for what is none, and for names, sizes and hashes
    that no artifact has."""
    where = f"{repo}: {MANIFEST_NAME}"
    manifest = parse_object(content, where, error)
    version, files = manifest.get("format_version"), manifest.get("files")
    if version is None:
        raise error(f"{where} is no artifact's manifest; ask its owner to push again")
    if version != FORMAT_VERSION:
        raise error(f"{repo}: artifact format {version!r}; this npuq knows {FORMAT_VERSION}: use another npuq")
    if not isinstance(files, dict) or not all(isinstance(entry, dict) for entry in files.values()):
        raise error(f"{where} lists no files; ask its owner to push again")
    for name in files:
        if name.endswith(PARTIAL_SUFFIX):
            raise error(f"{where}: {name[:80]!r} is a name of npuq's own, for what is not whole; refusing it")
    return [
        Wanted(
            FileName.parse(name, where, error),
            byte_count(entry.get("size"), where, error),
            Sha256.parse(entry.get("sha256"), where, error),
        )
        for name, entry in files.items()
    ]


def fetch_artifact(
    repository: Repository,
    listing: Listing,
    place: Place,
    missing: Sequence[Wanted],
    progress: TransferProgress,
    before_weights: BeforeWeights = lambda directory: None,
) -> None:
    """Fetch the missing files of an artifact, and its card; weights last. HubError."""
    files = _matched(repository, missing, listing)
    if CARD in listing.files and listing.files[CARD].digest is not None:
        files.append(as_listed(repository.repo, CARD, listing))
    weights = [wanted for wanted in files if wanted.name.endswith(_WEIGHTS)]
    progress.start(_total(files))
    fetch_all(repository, place, [wanted for wanted in files if not wanted.name.endswith(_WEIGHTS)], progress)
    if weights:
        before_weights(place.directory)
    fetch_all(repository, place, weights, progress)


def _matched(repository: Repository, missing: Sequence[Wanted], listing: Listing) -> list[Wanted]:
    """Before anything is fetched: HubError for files that the hub lacks or holds with another hash."""
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


def as_listed(repo: str, name: FileName, listing: Listing) -> Wanted:
    """A file as the hub lists it, which vouches for its content."""
    file = listing.files[name]
    if file.digest is None:
        raise HubError(f"{repo}: the hub lists no hash of {name}; npuq fetches nothing that it cannot check")
    return Wanted(name, file.size, file.digest)


def _total(files: Sequence[Wanted]) -> int:
    return sum(wanted.size for wanted in files)


def fetch_all(repository: Repository, place: Place, files: Sequence[Wanted], progress: TransferProgress) -> None:
    """Fetch several files at a time; one that fails does not keep the others from coming. HubError."""

    def fetch(wanted: Wanted) -> None:
        try:
            place.fetch(repository, wanted, progress.advance)
        except OSError as error:
            raise repository.failure(f"{repository.repo}: {wanted.name}", error) from None

    failed: list[NpuqError] = []
    for _, error in in_order(files, fetch, WORKERS):
        if isinstance(error, NpuqError):
            failed.append(error)
        elif error is not None:
            raise error
    place.remember()
    if failed:
        others = f" (and {len(failed) - 1} more files failed)" if len(failed) > 1 else ""
        raise type(failed[0])(f"{failed[0]}{others}")


def _pull_checkpoint(
    repository: HubRepository,
    listing: Listing,
    place: CachePlace,
    named: Revision,
    before_weights: BeforeWeights,
    progress: TransferProgress,
) -> Path:
    """An unquantized checkpoint, into the cache."""
    repo = repository.repo
    if UNFINISHED in listing.files or CONFIG not in listing.files:
        raise HubError(f"{repo}: neither a finished artifact ({MANIFEST_NAME}) nor a checkpoint ({CONFIG} and weights)")
    small = place.missing(beside_weights(repo, listing))
    fetch_all(repository, place, small, Silent())
    weights = place.missing(as_listed(repo, name, listing) for name in shard_names(place.directory, repo, listing))
    progress.start(_total(small) + _total(weights))
    progress.advance(_total(small))
    if weights:
        before_weights(place.directory)
    fetch_all(repository, place, weights, progress)
    place.refer(named)
    return place.directory


def beside_weights(repo: str, listing: Listing) -> list[Wanted]:
    """The files of a checkpoint that a conversion reads or copies, but for its weights."""
    names = [name for name in sorted(listing.files) if is_read_beside_weights(name) and "/" not in name]
    return [as_listed(repo, name, listing) for name in names]


def shard_names(directory: Path, repo: str, listing: Listing) -> list[FileName]:
    """The weights' files of a checkpoint whose other files are in `directory`: those that its index names, or its only
    one. CheckpointError for an index that names a file that is not there."""
    weight_map = read_weight_map(directory)
    if weight_map is None:
        named = {single_file(directory, [name for name in listing.files if "/" not in name])}
    else:
        named = set(weight_map.values())
    where = f"{repo}: the index"
    names = sorted(FileName.parse(name, where, CheckpointError) for name in named)
    for name in names:
        if name not in listing.files:
            raise CheckpointError(f"{repo}: {name} is missing there, the index names it")
    return names
