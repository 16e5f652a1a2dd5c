"""How much a conversion may hold in memory at once: workers × the working set of one chunk of rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

from ..errors import ConversionError
from .plan import Plan

# Four million values are 16 MB in float32: large enough that the cost of a call vanishes.
CHUNK_ELEMENTS = 4 << 20
# Below this, reads and writes become so small that the disk is slow.
_PREFERRED_MINIMUM = 256 << 10
# Working set of reading and quantizing, bytes a value of a chunk; measured (see tests/convert/test_memory.py).
BYTES_PER_ELEMENT = 64


@dataclass(frozen=True)
class Budget:
    """Workers, and how many values each may hold at a time. `nbytes` estimates the working set of all of them."""

    workers: int
    chunk_elements: int

    @property
    def nbytes(self) -> int:
        return self.workers * self.chunk_elements * BYTES_PER_ELEMENT


def plan_budget(plan: Plan, workers: int | None, max_memory: int | None) -> Budget:
    """Choose workers (default: cores of this process) and chunk so that the working set fits `max_memory` bytes.

    The working set is what conversion adds to the interpreter and torch. First the chunk shrinks, then the number of
    workers, then the chunk again down to two rows of the widest tensor. ConversionError when even that does not fit.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ConversionError(f"--workers must be at least 1, not {workers}")
    if max_memory is None:
        return Budget(workers, max(CHUNK_ELEMENTS, _smallest_chunk(plan)))
    affordable = max_memory // BYTES_PER_ELEMENT
    smallest = _smallest_chunk(plan)
    if affordable < smallest:
        raise ConversionError(
            f"--max-memory {max_memory} is too small: two rows of the widest tensor need "
            f"{smallest * BYTES_PER_ELEMENT} bytes; give at least that"
        )
    workers = max(1, min(workers, affordable // max(smallest, _PREFERRED_MINIMUM)))
    return Budget(workers, min(affordable // workers, max(CHUNK_ELEMENTS, smallest)))


def _smallest_chunk(plan: Plan) -> int:
    return max(2 * prod(job.shape[1:]) for job in plan.jobs)
