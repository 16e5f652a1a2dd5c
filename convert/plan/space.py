"""Disk space: the need of a conversion, and the free space."""

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

# Bytes of the journal for a weight: 115, and room for weights that are converted again.
_JOURNAL_BYTES_PER_JOB = 160


@dataclass(frozen=True)
class Space:
    """Bytes of disk: `needed` by the whole conversion, `missing` of them now, and `free`."""

    needed: int
    missing: int
    free: int

    @property
    def suffices(self) -> bool:
        return self.missing <= self.free

    def shortage(self, output: Path) -> str:
        """The missing and the free bytes, as the beginning of a message."""
        more = "more " if self.missing < self.needed else ""
        return f"{output} needs about {format_bytes(self.missing)} {more}and {format_bytes(self.free)} are free"


def plan_space(prepared: Prepared, output: Path, record: Record | None, small_bytes: int, ranks: int = 1) -> Space:
    """The disk space for an artifact in `output` with `small_bytes` beside its shards.

    `record` has the finished jobs; None: every job is finished. Each of `ranks` has a window and hidden states.
    """
    plan, own = prepared.plan, output / OWN_FOLDER
    scratch = ranks * _window_bytes(prepared.checkpoint)
    if prepared.calibration is not None:
        calibration, config = prepared.calibration, prepared.config
        scratch += ranks * state_bytes(calibration.tokens.numel(), config.hidden_size, calibration.selected(config))
    scratch += len(plan.jobs) * _JOURNAL_BYTES_PER_JOB
    needed = plan.output_bytes + small_bytes + scratch
    if record is None:
        return Space(needed, 0, free_bytes(output))
    done = sum([plan.jobs[index].output_bytes for index in record.jobs if index < len(plan.jobs)])
    # Overwritten blocks need no new room. Some file systems report no blocks.
    there = max(done, _allocated(output / shard.name for shard in plan.shards)) + min(scratch, _allocated(_files(own)))
    return Space(needed, max(0, needed - there), free_bytes(output))


def _window_bytes(checkpoint: Checkpoint) -> int:
    """The largest size in bytes of the window on a remote checkpoint; 0 for a local one."""
    if checkpoint.window is None:
        return 0
    return min(checkpoint.window.max_bytes, sum(info.nbytes for info in checkpoint.tensors.values()))


def free_bytes(output: Path) -> int:
    """Free bytes of the file system that `output` is or will be on."""
    existing = output.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else iter(())


def _allocated(paths: Iterable[Path]) -> int:
    """The bytes of allocated blocks of those files that exist."""
    blocks = 0
    for path in paths:
        with suppress(OSError):
            blocks += path.stat().st_blocks
    return 512 * blocks
