"""What every job is made of: ranges of rows, and what is written of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConversionError
from ..quant.dialects import WeightSource
from .journal import JobStats
from .plan import Job, Slot
from .shards import ShardFiles
from .written import Written


class StoppedError(Exception):
    """A job was abandoned because the conversion is ending; it will be done again."""


@dataclass(frozen=True)
class JobDone:
    """A converted tensor: its error sums, and what was written of it, if the thread's memory has all of that."""

    stats: JobStats
    written: Written | None = None


def row_chunks(job: Job, chunk_elements: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `chunk_elements` values (two rows at least), whole FP8 blocks where they fit.

    Always an even number of rows but for the last: two output rows share a byte of int4.
    """
    rows = max(2, chunk_elements // max(1, job.columns))
    granule = lcm(block_rows, 2)
    rows -= rows % (granule if rows >= granule else 2)
    for start in range(0, job.rows, rows):
        yield start, min(start + rows, job.rows)


def until(stop: threading.Event, chunks: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The chunks; StoppedError before the next one when `stop` is set."""
    for chunk in chunks:
        if stop.is_set():
            raise StoppedError
        yield chunk


def write_slot(files: ShardFiles, job: Job, slot: Slot, start: int, data: Tensor) -> None:
    """Write the rows of one output tensor from row `start` of the job on. ConversionError when the disk refuses."""
    write_bytes(files, job, slot, start, memory_of(data.contiguous()))


def write_bytes(files: ShardFiles, job: Job, slot: Slot, start: int, data: memoryview) -> None:
    """`write_slot` of the bytes that rows consist of."""
    # Exact: `start` is even, and a row of the source is a whole number of half bytes in every output.
    offset = slot.start + slot.nbytes * start // max(1, job.rows)
    try:
        files.write(slot.shard, offset, data)
    except OSError as error:
        raise ConversionError(
            f"{files.path(slot.shard)}: cannot write {slot.name!r}: {error.strerror}; "
            "make room (or repair the disk) and run the same command: it continues"
        ) from error


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they are."""
    buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(buffer)


def not_finite(name: str, source: WeightSource) -> CheckpointError:
    """The error of a weight that no scheme can store."""
    file = source.checkpoint.tensors[name].file
    return CheckpointError(
        f"{file}: tensor {name!r} holds infinities or NaN; the checkpoint is damaged: fetch that shard again"
    )
