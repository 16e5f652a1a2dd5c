"""Checks of an interrupted conversion: the journal is not trusted where the bytes can still be read.

Output: all bytes of finished jobs are read again. Source: files with another stamp (size, times, inode) are read as far
as jobs read them; the others are trusted. Jobs whose bytes differ are done again.
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ...errors import CheckpointError, ConversionError
from ...formats.checkpoint import Checkpoint
from ...formats.digests import source_digest
from ...formats.sources.weights import WeightSource
from ...inputs.files import FileStamp
from ...parallel.pool import Pool
from ...progress import Progress, Task
from ..plan.plan import Job, Plan
from .jobs import read_back_error, stored_digest
from .journal import Record
from .shards import ShardFiles

_BUFFER = 4 << 20


def stamps_now(checkpoint: Checkpoint) -> tuple[FileStamp, ...]:
    """The stamps of the files that have the checkpoint's names now, in the order of `checkpoint.stamps`. Raises
    CheckpointError for a missing one."""
    return tuple(map(_stamp, checkpoint.shards[: len(checkpoint.stamps)]))


def _stamp(path: Path) -> FileStamp:
    try:
        return FileStamp.of(path.stat())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def forget_impossible(record: Record, plan: Plan) -> None:
    """Remove from a record the jobs that this plan does not have, and the hashes of incomplete shards."""
    for index in [index for index in record.jobs if index >= len(plan.jobs)]:
        del record.jobs[index]
    for number in list(record.hashes):
        if number >= len(plan.shards) or any(index not in record.jobs for index in plan.shards[number].jobs):
            del record.hashes[number]


def forget_lost_shards(record: Record, files: ShardFiles, plan: Plan, progress: Progress) -> None:
    """Remove from a record the jobs of shards that are missing, or have another size or header.

    Raises ConversionError where too many open files prevent the check.
    """
    for number in sorted({plan.jobs[index].shard for index in record.jobs}):
        try:
            intact = files.is_intact(number)
        except OSError as error:
            raise read_back_error(files.path(number), error) from error
        if not intact:
            progress.note(f"{files.path(number)}: is gone or changed since the interrupted run; making it again")
            _forget(record, plan, plan.shards[number].jobs)


def forget_changed_output(record: Record, files: ShardFiles, plan: Plan, pool: Pool, progress: Progress) -> None:
    """Remove from a record the jobs whose bytes in the shards differ from those written.

    Raises ConversionError for a shard that cannot be read.
    """
    jobs = sorted([plan.jobs[index] for index in record.jobs], key=lambda job: (job.shard, job.span))
    progress.start(Task("check", sum([job.output_bytes for job in jobs])))
    local = threading.local()

    def check(job: Job) -> bytes:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(_BUFFER))
        try:
            return stored_digest(files, job, local.buffer)
        except OSError as error:
            raise read_back_error(files.path(job.shard), error) from error

    known = {index: entry.written for index, entry in record.jobs.items()}
    changed = []
    for job, digest in zip(jobs, pool.map(check, jobs), strict=True):
        progress.advance(job.output_bytes, layer=job.layer)
        if digest != known[job.index]:
            changed.append(job)
    for number in sorted({job.shard for job in changed}):
        mine = [job.index for job in changed if job.shard == number]
        progress.note(
            f"{files.path(number)}: {len(mine)} of its {len(plan.shards[number].jobs)} weights are not as they were "
            "written; making them again"
        )
        _forget(record, plan, mine)


def forget_changed_source(
    record: Record,
    source: WeightSource,
    plan: Plan,
    found: Sequence[FileStamp],
    kept: Collection[int],
    pool: Pool,
    progress: Progress,
) -> None:
    """Remove from a record the jobs that were made from other bytes than the source's files hold now.

    Only files with another stamp are read. `kept` are jobs that cannot be repeated one by one, since later ones were
    calibrated on their outputs: ConversionError where one of those would have to be.
    """
    checkpoint = source.checkpoint
    if checkpoint.window is not None:
        return  # pinned by its commit, a part of the conversion's identity
    changed_files = {
        path
        for path, before, now in zip(checkpoint.shards, _unless_other_files(record.sources, found), found, strict=True)
        if before != now
    }
    suspects = [
        plan.jobs[index]
        for index in sorted(record.jobs)
        if changed_files.intersection(_files(source, plan.jobs[index].source))
    ]
    if not suspects:
        return
    progress.note(
        f"{_named(changed_files)}: written, copied or fetched since weights were read from it; comparing it with what "
        "was converted"
    )
    progress.start(Task("check", sum([job.source_bytes for job in suspects])))
    changed = []
    for job, digest in zip(suspects, pool.map(lambda job: source_digest(source, job.source), suspects), strict=True):
        progress.advance(job.source_bytes, layer=job.layer)
        if digest != record.jobs[job.index].read:
            changed.append(job)
    if not changed:
        return
    blamed = _named({path for job in changed for path in _files(source, job.source)} & changed_files)
    if held := [job for job in changed if job.index in kept]:
        raise ConversionError(
            f"{blamed}: holds other weights than when it was calibrated ({len(held)} differ, first "
            f"{held[0].source!r}); put it back as it was, or give another output directory to begin anew"
        )
    progress.note(f"{blamed}: holds other weights than before; making {len(changed)} of them again")
    _forget(record, plan, [job.index for job in changed])


def _unless_other_files(before: Sequence[FileStamp], found: Sequence[FileStamp]) -> Sequence[FileStamp | None]:
    """The earlier stamps; where their number differs, None for every file found."""
    return before if len(before) == len(found) else [None] * len(found)


def _files(source: WeightSource, name: str) -> set[Path]:
    """The files that hold a weight's tensors."""
    return {source.checkpoint.info(stored).file for stored in source.weights[name].stored_names}


def _named(files: Collection[Path]) -> str:
    first, *others = sorted(files)
    return f"{first} (and {len(others)} more files)" if others else str(first)


def _forget(record: Record, plan: Plan, jobs: Iterable[int]) -> None:
    for index in jobs:
        record.jobs.pop(index, None)
        record.hashes.pop(plan.jobs[index].shard, None)
