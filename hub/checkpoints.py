"""Source checkpoints on a hub: the list of files to read, and fetching them all."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ..errors import CheckpointError, HubError
from ..formats.artifact import MANIFEST_NAME
from ..formats.checkpoint import CONFIG_NAME, read_weight_map, single_file
from ..formats.side_files import is_read_beside_weights
from ..inputs.names import FileName
from ..progress import Progress, Silent, Task
from .hub import Located
from .listing import Listing, Wanted, as_listed
from .pulling import BeforeWeights, fetch_all, total_bytes
from .remote_state import UNFINISHED

CONFIG: Final = FileName(CONFIG_NAME)


def fetch_checkpoint(located: Located, listing: Listing, progress: Progress, before_weights: BeforeWeights) -> Path:
    """Fetch a checkpoint into the hub's cache, checked against the hub's hashes; weights last. Raises HubError."""
    repository, place = located.repository, located.place
    if UNFINISHED in listing.files or CONFIG not in listing.files:
        raise HubError(
            f"{repository.repo}: neither a finished artifact ({MANIFEST_NAME}) nor a checkpoint ({CONFIG} and weights)"
        )
    small = place.missing(beside_weights(repository.repo, listing))
    fetch_all(repository, place, small, Silent())
    names = shard_names(place.directory, repository.repo, listing)
    weights = place.missing(as_listed(repository.repo, name, listing) for name in names)
    progress.start(Task("pull", total_bytes([*small, *weights])))
    progress.advance(total_bytes(small))
    if weights:
        before_weights(place.directory)
    fetch_all(repository, place, weights, progress)
    return place.finish()


def beside_weights(repo: str, listing: Listing) -> list[Wanted]:
    """The files without weights that a conversion of the checkpoint reads or copies."""
    names = [name for name in sorted(listing.files) if is_read_beside_weights(name) and "/" not in name]
    return [as_listed(repo, name, listing) for name in names]


def shard_names(directory: Path, repo: str, listing: Listing) -> list[FileName]:
    """The shards of a checkpoint whose other files are in `directory`: the index's, or the only file of weights.
    CheckpointError for an index that names a missing file."""
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
