"""Remote checkpoints: headers by range requests, tensors through a window of bounded size."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import IO, Final

from ..errors import CheckpointError, HubError
from ..formats.checkpoint import Checkpoint, collect_tensors, read_config, read_weight_map
from ..formats.safetensors import TensorInfo, parse_header
from ..inputs.names import FileName
from ..progress import Silent
from .checkpoints import CONFIG, beside_weights, shard_names
from .hub import Place, Repository
from .huggingface.hub import HuggingFace
from .listing import Listing, as_listed
from .names import parse_revision
from .pulling import fetch_all
from .transfer.download import fetch_range
from .transfer.parallel import in_order
from .transfer.retry import Backoff
from .transfer.window import Shard, Window

DEFAULT_WINDOW = 20_000_000_000
# Above any tokenizer; the user agreed to the window's disk space alone.
_MOST_SMALL_BYTES: Final = 1 << 30
# Most headers fit: one request a shard.
_HEADER_GUESS = 1 << 20
_WORKERS = 8


def open_remote(
    repo: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    window_bytes: int = DEFAULT_WINDOW,
    backoff: Backoff | None = None,
) -> Checkpoint:
    """Open a repository's checkpoint, pinned to one commit: fetches small files whole, and the weights' headers.

    After its window is started, it reads as any other checkpoint.

    Tensors pass through `folder`, which takes at most `window_bytes` of disk. The checkpoint's `directory` is the
    commit's snapshot in the Hugging Face cache, with all files but the weights. Raises HubError for the hub's refusals,
    CheckpointError as `Checkpoint.open` does.
    """
    if window_bytes < 1:
        raise HubError(f"the download window must be positive, not {window_bytes}")
    hub = HuggingFace(repo, token, backoff)
    pinned = hub.pinned(parse_revision(revision, hub.default_branch))
    repository = pinned.repository
    listing = repository.listing()
    directory = _fetch_small_files(repository, pinned.place, listing)
    config = read_config(directory)
    weight_map = read_weight_map(directory)
    names = shard_names(directory, repository.repo, listing)
    shards = [_shard(repository.repo, number, name, listing) for number, name in enumerate(names)]
    tensors = collect_tensors(directory, weight_map, _read_headers(repository, directory, shards))

    def fetch(shard: Shard, start: int, end: int, file: IO[bytes], received: Callable[[bytes], object]) -> None:
        fetch_range(repository, shard.name, shard.size, start, end, file, received)

    paths = {directory / shard.name: shard for shard in shards}
    window = Window(Path(folder), window_bytes, tensors, paths, fetch)
    return Checkpoint(directory, config, tensors, list(paths), WindowFiles(window), window, weight_map=weight_map)


class WindowFiles:
    """A window as a checkpoint's `Storage`: reads wait for the fetched bytes."""

    def __init__(self, window: Window):
        self._window = window

    def fill(self, info: TensorInfo, start: int, memory: memoryview) -> None:
        path, offset = self._window.wait_for(info.name)
        done = 0
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while done < len(memory):
                    count = os.preadv(descriptor, [memory[done:]], start - offset + done)
                    if count == 0:
                        raise CheckpointError(f"{path}: was cut short while tensor {info.name!r} was read")
                    done += count
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot read tensor {info.name!r}: {error.strerror}") from error

    def view(self, info: TensorInfo, files: object) -> None:
        """None: the window deletes the files that a memory map would need."""
        return

    def close(self) -> None:
        self._window.close()


def _fetch_small_files(repository: Repository, place: Place, listing: Listing) -> Path:
    """Fetch all files but the weights into the cache, checked by the hub's hashes; returns the snapshot's directory."""
    if CONFIG not in listing.files:
        raise HubError(f"{repository.repo}: has no {CONFIG}; it is not a checkpoint")
    files = beside_weights(repository.repo, listing)
    for file in files:
        if file.size > _MOST_SMALL_BYTES:
            raise HubError(f"{repository.repo}: {file.name} has {file.size} bytes, too much for a file beside weights")
    fetch_all(repository, place, place.missing(files), Silent())
    return place.directory


def _shard(repo: str, number: int, name: FileName, listing: Listing) -> Shard:
    file = as_listed(repo, name, listing)
    return Shard(number, name, file.size, file.digest)


def _read_headers(repository: Repository, directory: Path, shards: Sequence[Shard]) -> dict[str, dict[str, TensorInfo]]:
    def header(shard: Shard) -> dict[str, TensorInfo]:
        start = BytesIO()
        fetch_range(repository, shard.name, shard.size, 0, min(_HEADER_GUESS, shard.size), start)

        def read(offset: int, count: int) -> bytes:
            have = start.getbuffer().nbytes
            if offset + count > have:
                start.seek(0, os.SEEK_END)
                fetch_range(repository, shard.name, shard.size, have, offset + count, start)
            return bytes(start.getbuffer()[offset : offset + count])

        return parse_header(directory / shard.name, shard.size, read)[0]

    headers: dict[str, dict[str, TensorInfo]] = {}
    for shard, result in in_order(shards, header, _WORKERS):
        if isinstance(result, Exception):
            raise result
        headers[shard.name] = result
    return headers
