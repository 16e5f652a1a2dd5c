"""Disk that a conversion needs, and what there is of it."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ...formats.artifact import OWN_FOLDER
from ...formats.checkpoint import Checkpoint
from ...units import format_bytes
from ..calibrate.states import state_bytes
from ..write.journal import Record
from .prepare import Prepared

# A line of the journal for each weight.
_JOURNAL_BYTES_PER_JOB = 160


@dataclass(frozen=True)
class Space:
    """Bytes of disk: `needed` by the whole conversion, `missing` of these now, and `free`."""

    needed: int
    missing: int
    free: int

    @property
    def suffices(self) -> bool:
        return self.missing <= self.free

    def told(self, output: Path) -> str:
        """What a user should know when it does not suffice."""
        more = "more " if self.missing < self.needed else ""
        return f"{output} needs about {format_bytes(self.missing)} {more}and {format_bytes(self.free)} are free"


def plan_space(prepared: Prepared, output: Path, record: Record | None, small_bytes: int) -> Space:
    """The space for an artifact in `output` with so many bytes beside its shards, of which a record's jobs are done, or
    without a record all."""
    plan, own = prepared.plan, output / OWN_FOLDER
    scratch = _window_bytes(prepared.checkpoint)
    if prepared.calibration is not None:
        scratch += state_bytes(prepared.calibration.tokens.numel(), prepared.config.hidden_size)
    scratch += len(plan.jobs) * _JOURNAL_BYTES_PER_JOB
    needed = plan.output_bytes + small_bytes + scratch
    if record is None:
        return Space(needed, 0, free_bytes(output))
    done = sum([plan.jobs[index].output_bytes for index in record.jobs if index < len(plan.jobs)])
    # What is written again takes no room again. Some file systems tell of no blocks.
    there = max(done, _allocated(output / shard.name for shard in plan.shards)) + min(scratch, _allocated(_files(own)))
    return Space(needed, max(0, needed - there), free_bytes(output))


def _window_bytes(checkpoint: Checkpoint) -> int:
    """What the window on a checkpoint that passes by takes at most."""
    if checkpoint.window is None:
        return 0
    return min(checkpoint.window.max_bytes, sum(info.nbytes for info in checkpoint.tensors.values()))


def free_bytes(output: Path) -> int:
    """Free space of the file system that `output` is or will be on."""
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else iter(())


def _allocated(paths: Iterable[Path]) -> int:
    """The blocks of those that exist, in bytes."""
    blocks = 0
    for path in paths:
        with suppress(OSError):
            blocks += path.stat().st_blocks
    return 512 * blocks
