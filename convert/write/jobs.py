"""Parts of one job: chunks of rows, the writing of its tensors into a shard, and the digest of its bytes there."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...deferred import torch
from ...errors import ConversionError
from ...formats.digests import Digest, combined
from ...formats.output_files import write_error
from ...inputs.files import TOO_MANY_OPEN, reason
from ...parallel.threads import StoppedError
from ..plan.plan import Job, Slot
from .journal import JobEntry
from .shards import ShardFiles
from .workspace import Written

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


@dataclass(frozen=True)
class JobDone:
    """A converted tensor: its journal entry, and its written bytes where the thread's memory still holds them."""

    entry: JobEntry
    written: Written | None = None


def until(stop: threading.Event, chunks: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the chunks; raise StoppedError before the next one when `stop` is set."""
    for chunk in chunks:
        if stop.is_set():
            raise StoppedError
        yield chunk


def memory_of(array: NDArray[Any]) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    buffer: Any = array.reshape(-1).view(np.uint8)
    return memoryview(buffer)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, copied only where it is not contiguous."""
    return memory_of(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


class JobOutput:
    """Writes the tensors of one job into its shard. The rows of a tensor come in order."""

    def __init__(self, files: ShardFiles, job: Job):
        self._files = files
        self._job = job
        self._digests = {slot.name: Digest() for slot in job.outputs}

    def write(self, slot: Slot, start: int, data: memoryview) -> None:
        """Write the bytes of rows of one tensor from row `start` of the job on. Raises ConversionError when the disk
        refuses."""
        # Exact: `start` is even, and a row of the source is a whole number of half bytes in every output.
        offset = slot.start + slot.nbytes * start // max(1, self._job.rows)
        self._digests[slot.name].update(data)
        try:
            self._files.write(slot.shard, offset, data)
        except OSError as error:
            raise write_error(self._files.path(slot.shard), error) from error

    def digest(self) -> bytes:
        """The digest of every byte written."""
        return combined(self._digests[slot.name].result() for slot in self._job.outputs)


def read_back_error(path: Path, error: OSError) -> ConversionError:
    """The error for a shard that cannot be read after it was written, with a remedy."""
    message = f"{path}: cannot be read back: {reason(error)}"
    return ConversionError(
        message if error.errno in TOO_MANY_OPEN else f"{message}; remove it, and the same command makes it again"
    )


def stored_digest(files: ShardFiles, job: Job, buffer: memoryview) -> bytes:
    """The digest of the bytes that a job's slots hold in the file now. Raises OSError when they cannot be read.

    buffer: memory to read into, of any size.
    """
    digests = []
    for slot in job.outputs:
        digest = Digest()
        for piece in files.read(slot.shard, slot.start, slot.nbytes, buffer):
            digest.update(piece)
        digests.append(digest.result())
    return combined(digests)
