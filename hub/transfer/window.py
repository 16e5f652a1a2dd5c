"""The window, the bounded part of a remote checkpoint on disk: tensors are fetched ahead of their reader and dropped
behind it.

Tensors that are used together form a group; consecutive groups form a batch. The byte ranges of a batch in every shard
are fetched into files of a folder, which are removed when all its groups are released. Batches are admitted in order
while they fit into the window, so that the next group is always present or in transfer, with any size of window.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import uuid
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ...errors import CheckpointError
from ...formats.safetensors import TensorInfo
from ...inputs.names import FileName
from ..names import Digest
from .parallel import start_threads
from .partial import PARTIAL_SUFFIX

_FETCHERS = 4
_BATCH_BYTES = 256 << 20
# Fetching a small gap is cheaper than another request.
_GAP_BYTES = 64 << 10
_OURS = re.compile(r"[0-9]+-[0-9a-f]{40,64}\.[0-9]+-[0-9]+(\.[0-9a-f]{32}" + re.escape(PARTIAL_SUFFIX) + ")?")


@dataclass(frozen=True)
class Shard:
    """A shard on the hub: its number in the checkpoint, its name, its size in bytes and its hash."""

    number: int
    name: FileName
    size: int
    digest: Digest


# Fetch(shard, start, end, file, received): append bytes [start, end) of a shard to the file.
Fetch = Callable[[Shard, int, int, IO[bytes], Callable[[bytes], object]], None]


@dataclass
class Extent:
    """Bytes [start, end) of a shard: a file of the folder from `ready` to `released`."""

    shard: Shard
    start: int
    end: int
    ready: bool = False
    released: bool = False

    @property
    def file_name(self) -> str:
        # The number distinguishes shards of any name, the hash those of other commits and repositories.
        return f"{self.shard.number:05d}-{self.shard.digest}.{self.start}-{self.end}"


@dataclass
class _Batch:
    extents: list[Extent]
    groups_left: int
    admitted: bool = False
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(extent.end - extent.start for extent in self.extents)


def remove_left_over(folder: Path) -> None:
    """Remove the files that an interrupted run has left in a window's folder, and the folder if nothing else is in it.
    Raises OSError."""
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name):
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


class StoppedFetchError(Exception):
    """The end of a fetch because the window was closed."""


class Window:
    """The fetched part of a remote checkpoint: at most `max_bytes`, or one batch where that is larger."""

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        tensors: Mapping[str, TensorInfo],
        shards: Mapping[Path, Shard],
        fetch: Fetch,
    ):
        """`shards` has the shard of each `TensorInfo.file`."""
        self._folder = folder
        self.max_bytes = max_bytes
        self._tensors = tensors
        self._shards = shards
        self._fetch = fetch
        self._changed = threading.Condition()
        self._extent_of: dict[str, Extent] = {}
        self._batch_of: dict[str, _Batch] = {}
        self._queue: deque[tuple[_Batch, Extent]] = deque()
        # An earlier run's files of batches that are not yet admitted: file name → bytes, in the order of fetching.
        self._left_over: dict[str, int] = {}
        self._resident = 0
        self._admitted = 0
        self._failure: Exception | None = None
        self._closed = False
        self._threads: list[threading.Thread] = []
        self.most_resident = 0

    def start(self, groups: Iterable[Sequence[str]], finished: Container[str]) -> None:
        """Begin to fetch the tensors of these groups, in this order, without groups whose first tensor is `finished`.

        The folder's files of an earlier run with the same groups are used, and count towards the window.
        """
        for gathered in self._gather(groups):
            left = [group for group in gathered if group[0] not in finished]
            if not left:
                continue
            # The ranges cover finished groups too: they are the same in every run, so that their files are found again.
            extent_of = self._extents([name for group in gathered for name in group])
            self._extent_of |= {name: extent_of[name] for group in left for name in group}
            needed = {extent_of[name].file_name for group in left for name in group}
            extents = list({x.file_name: x for x in extent_of.values() if x.file_name in needed}.values())
            batch = _Batch(extents, len(left))
            self._batch_of |= {group[0]: batch for group in left}
            self._queue.extend((batch, extent) for extent in extents)
        try:
            self._tidy({extent.file_name: extent.end - extent.start for _, extent in self._queue})
        except OSError as error:
            raise self._disk_error(error) from error
        start_threads(self._run, _FETCHERS, "npuq-fetch", self._threads)

    def wait_for(self, name: str) -> tuple[Path, int]:
        """Wait for the file of an announced tensor; returns it and its offset in the shard.

        Raises the error of a failed fetch, or CheckpointError after `close`.
        """
        with self._changed:
            extent = self._extent_of.get(name)
            if extent is None:
                raise CheckpointError(f"tensor {name!r} was not announced, or was released already")
            self._changed.wait_for(lambda: extent.ready or self._failure is not None or self._closed)
            if self._failure is not None:
                raise self._failure
            if not extent.ready:
                raise CheckpointError("interrupted while a tensor was fetched")
            return self._folder / extent.file_name, extent.start

    def release(self, group: Sequence[str]) -> None:
        """Drop the tensors of a group."""
        with self._changed:
            for name in group:
                del self._extent_of[name]
            batch = self._batch_of.pop(group[0])
            batch.groups_left -= 1
            if batch.groups_left:
                return
            for extent in batch.extents:
                extent.released = True
                (self._folder / extent.file_name).unlink(missing_ok=True)
            self._resident -= batch.nbytes
            self._admitted -= 1
            self._changed.notify_all()

    def interrupt(self) -> None:
        """End waiting reads and fetches; fetched files stay for the next run."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """End the fetchers, and remove the folder if it is empty."""
        self.interrupt()
        for thread in self._threads:
            thread.join(timeout=5)
        with contextlib.suppress(OSError):
            self._folder.rmdir()

    def _gather(self, groups: Iterable[Sequence[str]]) -> Iterator[list[Sequence[str]]]:
        """Gather consecutive groups to about a quarter of the window, so that fetching and reading overlap."""
        limit = min(_BATCH_BYTES, self.max_bytes // 4)
        gathered: list[Sequence[str]] = []
        size = 0
        for group in groups:
            nbytes = sum(self._tensors[name].nbytes for name in group)
            if gathered and size + nbytes > limit:
                yield gathered
                gathered, size = [], 0
            gathered.append(group)
            size += nbytes
        if gathered:
            yield gathered

    def _extents(self, names: Sequence[str]) -> dict[str, Extent]:
        """The extent of each of these tensors, in the order of the shards."""
        extent_of: dict[str, Extent] = {}
        last: Extent | None = None
        for name in sorted(names, key=self._position):
            info, shard = self._tensors[name], self._shards[self._tensors[name].file]
            if last is None or last.shard.number != shard.number or info.start - last.end > _GAP_BYTES:
                last = Extent(shard, info.start, info.end)
            last.end = max(last.end, info.end)
            extent_of[name] = last
        return extent_of

    def _position(self, name: str) -> tuple[int, int]:
        info = self._tensors[name]
        return self._shards[info.file].number, info.start

    def _tidy(self, kept: Mapping[str, int]) -> None:
        """Make the folder, and remove earlier runs' files that are not in `kept` (name → size) or exceed the window."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for path in self._folder.iterdir():
            if _OURS.fullmatch(path.name) and path.stat().st_size != kept.get(path.name):
                path.unlink()
        self._left_over = {name: size for name, size in kept.items() if (self._folder / name).exists()}
        self._resident = sum(self._left_over.values())
        self._drop_left_over(self.max_bytes, ())

    def _drop_left_over(self, most: int, needed: Container[str]) -> None:
        """Remove an earlier run's files, the last first, until at most `most` bytes are resident."""
        for name in reversed([name for name in self._left_over if name not in needed]):
            if self._resident <= most:
                return
            (self._folder / name).unlink(missing_ok=True)
            self._resident -= self._left_over.pop(name)

    def _disk_error(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"{error.filename or self._folder}: cannot be written: {error.strerror or error}; "
            "make room, or give a smaller --download-window, and run the same command: it continues"
        )

    def _run(self) -> None:
        try:
            while (extent := self._next()) is not None:
                self._bring(extent)
        except StoppedFetchError:
            return
        except Exception as error:  # raised where the tensor is waited for
            failure = self._disk_error(error) if isinstance(error, OSError) else error
            with self._changed:
                self._failure = self._failure or failure
                self._changed.notify_all()

    def _next(self) -> Extent | None:
        """The next extent in order, as soon as its batch fits; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._failure is not None or self._may_start())
            if self._closed or self._failure is not None or not self._queue:
                return None
            batch, extent = self._queue.popleft()
            if not batch.admitted:
                self._admit(batch)
            return extent

    def _admit(self, batch: _Batch) -> None:
        names = {extent.file_name for extent in batch.extents}
        missing = batch.nbytes - sum(self._left_over.get(name, 0) for name in names)
        self._drop_left_over(self.max_bytes - missing, names)
        for name in names:
            self._left_over.pop(name, None)
        batch.admitted = True
        self._admitted += 1
        self._resident += missing
        self.most_resident = max(self.most_resident, self._resident)

    def _may_start(self) -> bool:
        """True where the next batch is admitted, or fits. A batch that the reader waits for is made to fit."""
        if not self._queue:
            return True
        batch = self._queue[0][0]
        missing = batch.nbytes - sum(self._left_over.get(extent.file_name, 0) for extent in batch.extents)
        return batch.admitted or self._admitted == 0 or self._resident + missing <= self.max_bytes

    def _bring(self, extent: Extent) -> None:
        target = self._folder / extent.file_name
        if not target.exists():
            # A unique name: a fetcher of an interrupted run may still be writing.
            partial = self._folder / f"{extent.file_name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}"
            with partial.open("wb") as file:
                self._fetch(extent.shard, extent.start, extent.end, file, self._check_open)
                file.flush()
                # Synced before it is renamed: after a loss of power the name must not have other content.
                os.fsync(file.fileno())
            partial.replace(target)
        with self._changed:
            extent.ready = True
            if extent.released:  # its groups were done without it
                target.unlink(missing_ok=True)
            self._changed.notify_all()

    def _check_open(self, piece: bytes) -> None:
        if self._closed:
            raise StoppedFetchError
