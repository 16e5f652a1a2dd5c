"""What a job writes: each of its tensors row after row, with a digest of all of it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ...errors import ConversionError
from ...formats.digests import Digest, combined
from ...formats.output_files import write_error
from ...inputs.files import TOO_MANY_OPEN, reason
from ..plan.plan import Job, Slot
from .chunks import memory_of
from .shards import ShardFiles


class JobOutput:
    """The tensors of one job on their way into its shard. Rows of a tensor come in their order."""

    def __init__(self, files: ShardFiles, job: Job):
        self._files = files
        self._job = job
        self._digests = {slot.name: Digest() for slot in job.outputs}

    def write(self, slot: Slot, start: int, data: Tensor) -> None:
        """Write the rows of one tensor from row `start` of the job on. ConversionError when the disk refuses."""
        self.write_bytes(slot, start, memory_of(data.contiguous()))

    def write_bytes(self, slot: Slot, start: int, data: memoryview) -> None:
        """`write` of the bytes that rows consist of."""
        # Exact: `start` is even, and a row of the source is a whole number of half bytes in every output.
        offset = slot.start + slot.nbytes * start // max(1, self._job.rows)
        self._digests[slot.name].update(data)
        try:
            self._files.write(slot.shard, offset, data)
        except OSError as error:
            raise write_error(self._files.path(slot.shard), error) from error

    def digest(self) -> bytes:
        """Of everything that was written."""
        return combined(self._digests[slot.name].result() for slot in self._job.outputs)


def read_back_error(path: Path, error: OSError) -> ConversionError:
    """The error for a shard that cannot be read after it was written, with what to do."""
    told = f"{path}: cannot be read back: {reason(error)}"
    return ConversionError(
        told if error.errno in TOO_MANY_OPEN else f"{told}; remove it, and the same command makes it again"
    )


def stored_digest(files: ShardFiles, job: Job, buffer: memoryview) -> bytes:
    """The digest of what a job's places in the shard hold now. OSError when they cannot be read.

    buffer: memory to read into, of any size.
    """
    digests = []
    for slot in job.outputs:
        digest = Digest()
        for piece in files.read(slot.shard, slot.start, slot.nbytes, buffer):
            digest.update(piece)
        digests.append(digest.result())
    return combined(digests)
