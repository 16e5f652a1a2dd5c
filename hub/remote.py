"""A checkpoint that stays on the hub: headers by range requests, tensors through a window of bounded size."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from ..errors import CheckpointError, HubError
from ..quant.artifact import CARD_NAME
from ..quant.checkpoint import CONFIG_NAME, Checkpoint, collect_tensors, read_config, read_weight_map, single_file
from ..quant.safetensors import TensorInfo, parse_header
from .client import Backoff, Hub
from .download import fetch_range
from .parallel import in_order
from .remote_state import RemoteFile, list_files
from .window import Window

DEFAULT_WINDOW = 20_000_000_000
# Everything beside the weights that a conversion may copy or read. Fetched into the cache, as any tool would.
_SMALL_FILES = (
    "*.json", "tokenizer*", "*.tiktoken", "*.model", "*.jinja", "merges.txt", "vocab.txt", "LICENSE*", "*.py", CARD_NAME
)  # fmt: skip
_SMALL_BYTES = 64 << 20
# Most headers fit: one request a shard.
_HEADER_GUESS = 1 << 20
_WORKERS = 8


class RemoteCheckpoint(Checkpoint):
    """A checkpoint on the hub, pinned to one commit. Read it as any other, after `expect`.

    `directory` is the commit's snapshot in the Hugging Face cache, with all files but the weights.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        tensors: dict[str, TensorInfo],
        shards: Sequence[Path],
        window: Window,
    ):
        super().__init__(directory, config, tensors, shards)
        self.window = window

    @classmethod
    def open_remote(
        cls,
        repo: str,
        folder: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        window_bytes: int = DEFAULT_WINDOW,
        backoff: Backoff | None = None,
    ) -> RemoteCheckpoint:
        """Open a repository's checkpoint: small files are fetched, of the weights only the headers are read.

        Tensors pass through `folder`, of which `window_bytes` at most are in use. Raises HubError for what the hub
        refuses, CheckpointError as `Checkpoint.open` does.
        """
        if window_bytes < 1:
            raise HubError(f"the download window must be positive, not {window_bytes}")
        hub = Hub(repo, token, backoff)
        commit = str(hub.call(f"opening {repo}", lambda: hub.api.repo_info(repo, revision=revision).sha))
        files = list_files(hub, commit)
        directory = _fetch_small_files(hub, commit, files)
        config = read_config(directory)
        weight_map = read_weight_map(directory)
        shards = sorted(set(weight_map.values())) if weight_map else [single_file(directory, _root_files(files))]
        headers = _read_headers(hub, commit, directory, shards, files)
        tensors = collect_tensors(directory, weight_map, headers)

        def fetch(shard: str, start: int, end: int, file: IO[bytes], received: Callable[[bytes], object]) -> None:
            fetch_range(hub, shard, commit, start, end, file, received)

        window = Window(Path(folder), window_bytes, tensors, fetch)
        return cls(directory, config, tensors, [directory / shard for shard in shards], window)

    @property
    def passes_by(self) -> bool:
        return True

    @property
    def scratch_bytes(self) -> int:
        """What the window takes at most."""
        return min(self.window.max_bytes, sum(info.nbytes for info in self.tensors.values()))

    def expect(self, groups: Iterable[Sequence[str]], finished: Container[str]) -> None:
        self.window.start(groups, finished)

    def release(self, group: Sequence[str]) -> None:
        self.window.release(group)

    def interrupt(self) -> None:
        self.window.interrupt()

    def view(self, name: str) -> Tensor:
        """A copy: what has passed the window is gone, and so would the memory map's file be."""
        return self.read(name)

    def close(self) -> None:
        self.window.close()
        super().close()

    def _fill(self, info: TensorInfo, start: int, memory: memoryview) -> None:
        path, offset = self.window.wait_for(info.name)
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


def _root_files(files: Mapping[str, RemoteFile]) -> list[str]:
    return [name for name in files if "/" not in name]


def _fetch_small_files(hub: Hub, commit: str, files: Mapping[str, RemoteFile]) -> Path:
    """The snapshot directory in the cache."""
    names = [
        name
        for name in _root_files(files)
        if files[name].size <= _SMALL_BYTES and any(fnmatchcase(name, pattern) for pattern in _SMALL_FILES)
    ]
    if CONFIG_NAME not in names:
        raise HubError(f"{hub.repo}: has no {CONFIG_NAME}; it is not a checkpoint")

    def download(name: str) -> Path:
        doing = f"{hub.repo}: {name}"
        return hub.call(doing, lambda: Path(hub.api.hf_hub_download(hub.repo, name, revision=commit)), attempts=3)

    directory: Path | None = None
    for _, result in in_order(names, download, _WORKERS):
        if isinstance(result, Exception):
            raise result
        directory = result.parent
    assert directory is not None
    return directory


def _read_headers(
    hub: Hub, commit: str, directory: Path, shards: Sequence[str], files: Mapping[str, RemoteFile]
) -> dict[str, dict[str, TensorInfo]]:
    for shard in shards:
        if shard not in files:
            raise CheckpointError(f"{hub.repo}: {shard} is missing there, the index names it")

    def header(shard: str) -> dict[str, TensorInfo]:
        size = files[shard].size
        start = BytesIO()
        fetch_range(hub, shard, commit, 0, min(_HEADER_GUESS, size), start, lambda piece: None)

        def read(offset: int, count: int) -> bytes:
            have = start.getbuffer().nbytes
            if offset + count > have:
                start.seek(0, os.SEEK_END)
                fetch_range(hub, shard, commit, have, offset + count, start, lambda piece: None)
            return bytes(start.getbuffer()[offset : offset + count])

        return parse_header(directory / shard, size, read)[0]

    headers = {}
    for shard, result in in_order(shards, header, _WORKERS):
        if isinstance(result, Exception):
            raise result
        headers[shard] = result
    return headers
