"""What every job is made of: ranges of rows, memory, and the ways in which it ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ...parallel.threads import StoppedError
from ..plan.plan import Job
from .journal import JobEntry
from .written import Written


@dataclass(frozen=True)
class JobDone:
    """A converted tensor: what the journal keeps of it, and what was written of it, if the thread's memory has that."""

    entry: JobEntry
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


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, where they are."""
    buffer: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(buffer)
