"""The memory budget of a conversion: workers × the working set of one chunk of rows."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod

from ...errors import ConversionError
from ...formats.schemes import Scheme
from ...native import library as native
from ...quant.scales import Method
from .plan import Plan

# A million values: large enough that the cost of a call vanishes, small enough that a chunk is still in cache when it
# is converted.
CHUNK_ELEMENTS = 1 << 20
# Below this, reads and writes become so small that the disk is slow: fewer workers are better.
_PREFERRED_MINIMUM = 128 << 10

# Upper bounds in bytes a value of a chunk, measured on random weights: for reading, rounding and packing in torch, and
# in addition for the scale search in torch, which grows with its rows up to a block of them.
BYTES_PER_ELEMENT = 40
SEARCH_BYTES_PER_ELEMENT = 1280
SEARCH_BYTES = 160 << 20
# Bytes of headers and plan for each source weight, measured on DeepSeek-V3's 46183; `--max-memory` does not bound them.
PLAN_BYTES_PER_JOB = 5 << 10


@dataclass(frozen=True)
class Budget:
    """The number of workers, the values that each may hold at a time, and an upper bound in bytes for all of them
    together."""

    workers: int
    chunk_elements: int
    nbytes: int


def plan_budget(plan: Plan, workers: int | None, max_memory: int | None, held: int = 0) -> Budget:
    """Choose workers (default: cores of this process) and chunk so that the working set fits `max_memory` bytes.

    `held` is the number of bytes that the source holds for each worker, whatever the chunk.

    The working set is the memory that conversion adds to the interpreter and torch. First the chunk shrinks, then the
    number of workers, then the chunk again down to two rows of the widest tensor. Raises ConversionError when even that
    does not fit.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ConversionError(f"--workers must be at least 1, not {workers}")
    # The native kernels search within a row; torch's vectors of candidates span a block of them.
    searching = any(job.scheme is not Scheme.FLOAT and job.method.scale_search is Method.MSE for job in plan.jobs)
    search = searching and native.library() is None
    smallest = max(2 * prod(job.shape[1:]) for job in plan.jobs)
    largest = max(CHUNK_ELEMENTS, smallest)
    if max_memory is None:
        return Budget(workers, largest, workers * (held + _working_set(largest, search)))
    least = held + _working_set(smallest, search)
    if max_memory < least:
        rotated = ", and the largest weight that is rotated as a whole," if held else ""
        raise ConversionError(
            f"--max-memory {max_memory} is too small: two rows of the widest tensor{rotated} need {least} bytes; "
            "give at least that"
        )
    preferred = held + _working_set(max(smallest, _PREFERRED_MINIMUM), search)
    workers = max(1, min(workers, max_memory // preferred))
    chunk = min(_affordable(max_memory // workers - held, search), largest)
    return Budget(workers, chunk, workers * (held + _working_set(chunk, search)))


def _working_set(elements: int, search: bool) -> int:
    extra = min(SEARCH_BYTES, SEARCH_BYTES_PER_ELEMENT * elements) if search else 0
    return BYTES_PER_ELEMENT * elements + extra


def _affordable(nbytes: int, search: bool) -> int:
    """The largest number of values whose working set fits."""
    if not search:
        return nbytes // BYTES_PER_ELEMENT
    within = nbytes // (BYTES_PER_ELEMENT + SEARCH_BYTES_PER_ELEMENT)
    return max(within, (nbytes - SEARCH_BYTES) // BYTES_PER_ELEMENT)
