"""One job, executed: read rows, quantize them, write each result into its slot, in chunks of bounded size."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from math import lcm
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError, ConversionError
from ..quant.dialects import WeightSource
from ..quant.safetensors import DTYPES
from ..quant.scales import NonFiniteError
from ..quant.schemes import INPUT_OFFSET, INPUT_SCALE, WEIGHT, QuantizedRows, Scheme, quantize_stored
from ..quant.stored import QuantizedSource
from .architecture import Role
from .journal import JobStats
from .plan import Job, Slot
from .shards import ShardFiles


class StoppedError(Exception):
    """A job was abandoned because the conversion is ending; it will be done again."""


def run_job(job: Job, source: WeightSource, files: ShardFiles, chunk_elements: int, stop: threading.Event) -> JobStats:
    """Convert one tensor, at most about `chunk_elements` values at a time, and return its error sums.

    Raises CheckpointError for infinities and NaN in the source, ConversionError when the disk refuses, StoppedError
    when `stop` is set between chunks.
    """
    squared_error = np.zeros(job.rows)
    squared_norm = np.zeros(job.rows)
    small: dict[Slot, list[Tensor]] = {}
    for start, end in row_chunks(job, chunk_elements, source.block_rows):
        if stop.is_set():
            raise StoppedError
        if job.scheme is Scheme.FLOAT:
            write_slot(files, job, job.outputs[0], start, _float_rows(job, source, start, end))
            continue
        quantized = _quantized_rows(job, source, start, end)
        for slot in job.outputs:
            if slot.suffix == WEIGHT:
                write_slot(files, job, slot, start, quantized.tensors[WEIGHT])
            # One value for the whole linear comes with its first rows.
            elif slot.suffix not in (INPUT_SCALE, INPUT_OFFSET) or start == 0:
                small.setdefault(slot, []).append(quantized.tensors[slot.suffix])
        squared_error[start:end] = quantized.squared_error.numpy()
        squared_norm[start:end] = quantized.squared_norm.numpy()
    # A few bytes a row: one write a tensor, not one a chunk.
    for slot, parts in small.items():
        write_slot(files, job, slot, 0, torch.cat(parts))
    # One sum over all rows, however they were chunked: the result does not depend on the chunks.
    return JobStats(float(squared_error.sum()), float(squared_norm.sum()))


def _quantized_rows(job: Job, source: WeightSource, start: int, end: int) -> QuantizedRows:
    if isinstance(source, QuantizedSource):
        return source.quantized_rows(job.source, start, end, row_parallel=job.row_parallel)
    stored = source.stored_rows(job.source, start, end)
    try:
        return quantize_stored(stored, job.scheme, job.method.scale_search, row_parallel=job.row_parallel)
    except NonFiniteError as error:
        raise _not_finite(job, source) from error


def row_chunks(job: Job, chunk_elements: int, block_rows: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of at most `chunk_elements` values (two rows at least), whole FP8 blocks where they fit.

    Always an even number of rows but for the last: two output rows share a byte of int4.
    """
    rows = max(2, chunk_elements // max(1, job.columns))
    granule = lcm(block_rows, 2)
    rows -= rows % (granule if rows >= granule else 2)
    for start in range(0, job.rows, rows):
        yield start, min(start + rows, job.rows)


def _float_rows(job: Job, source: WeightSource, start: int, end: int) -> Tensor:
    target = DTYPES[job.outputs[0].dtype]
    if not job.shape:
        rows = source.checkpoint.read(job.source)
    elif target is torch.float32:
        rows = source.rows_float32(job.source, start, end)
    else:
        rows = source.rows_float(job.source, start, end)
    # Unknown tensors may hold anything; in a known one an infinity is damage.
    if job.role is not Role.OTHER and not torch.isfinite(rows).all():
        raise _not_finite(job, source)
    return rows


def write_slot(files: ShardFiles, job: Job, slot: Slot, start: int, data: Tensor) -> None:
    """Write the rows of one output tensor from row `start` of the job on. ConversionError when the disk refuses."""
    # Exact: `start` is even, and a row of the source is a whole number of half bytes in every output.
    offset = slot.start + slot.nbytes * start // max(1, job.rows)
    buffer: Any = data.contiguous().reshape(-1).view(torch.uint8).numpy()
    try:
        files.write(slot.shard, offset, memoryview(buffer))
    except OSError as error:
        raise ConversionError(
            f"{files.path(slot.shard)}: cannot write {slot.name!r}: {error.strerror}; "
            "make room (or repair the disk) and run the same command: it continues"
        ) from error


def _not_finite(job: Job, source: WeightSource) -> CheckpointError:
    file = source.checkpoint.tensors[job.source].file
    return CheckpointError(
        f"{file}: tensor {job.source!r} holds infinities or NaN; the checkpoint is damaged: fetch that shard again"
    )
