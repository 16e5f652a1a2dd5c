"""Weights that other ranks have quantized, copied into the shards by rank 0: a shard has one writer."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

from ....errors import ConversionError
from ....formats.digests import Digest, combined
from ....formats.output_files import make_folder
from ....parallel.pool import Mapper
from ...plan.plan import Job, Plan
from ...write.journal import JobEntry
from ...write.shards import ShardFiles
from ..states import remove_staged, staged_folder

_BUFFER = 4 << 20


class Staging:
    """The staged weights of all ranks in a walk's folder. Files are sparse, and have each weight at its place."""

    def __init__(self, folder: Path, plan: Plan):
        self._folder, self._plan = folder, plan

    def files(self, rank: int) -> ShardFiles:
        """A rank's own files, to write to. Raises OSError."""
        make_folder(self._folder)
        folder = staged_folder(self._folder, rank)
        remove_staged(folder)
        make_folder(folder)
        return ShardFiles(folder, self._plan)

    def clear(self, rank: int) -> None:
        """Remove what a rank has staged, for more of it. Raises OSError."""
        for path in staged_folder(self._folder, rank).glob("*.safetensors"):
            path.unlink()

    def copy(self, jobs: Mapping[int, int], entries: Mapping[int, JobEntry], files: ShardFiles, mapper: Mapper) -> None:
        """Copy the weights of some jobs, each from its rank, into the shards.

        Raises ConversionError where they are not as that rank wrote them, OSError where the disk refuses.
        """
        sources = {rank: ShardFiles(staged_folder(self._folder, rank), self._plan) for rank in set(jobs.values())}
        local = threading.local()

        def one(index: int) -> None:
            if not hasattr(local, "buffer"):
                local.buffer = memoryview(bytearray(_BUFFER))
            job, rank = self._plan.jobs[index], jobs[index]
            if _copied(job, sources[rank], files, local.buffer) != entries[index].written:
                raise ConversionError(
                    f"{sources[rank].path(job.shard)}: {job.source!r} is not as rank {rank} wrote it: the file system "
                    "that the ranks share lost some of it; run the same command again"
                )

        for _ in mapper.map(one, jobs):
            pass


def _copied(job: Job, source: ShardFiles, files: ShardFiles, buffer: memoryview) -> bytes:
    """Copy a job's tensors; return their digest."""
    digests = []
    for slot in job.outputs:
        digest, start = Digest(), slot.start
        for piece in source.read(slot.shard, slot.start, slot.nbytes, buffer):
            digest.update(piece)
            files.write(slot.shard, start, piece)
            start += len(piece)
        digests.append(digest.result())
    return combined(digests)
