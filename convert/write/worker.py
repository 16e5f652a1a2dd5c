"""One job, executed: read rows, quantize them, write each result into its slot, in chunks of bounded size."""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from ...formats.dialects import WeightSource
from ...formats.digests import source_digest
from ...formats.safetensors import DTYPES
from ...formats.schemes import INPUT_OFFSET, INPUT_SCALE, WEIGHT, QuantizedRows, Scheme, quantize_stored
from ...formats.stored import QuantizedSource
from ...models.roles import Role
from ...quant.scales import NonFiniteError
from ..plan.plan import Job, Slot
from .chunks import JobDone, not_finite, row_chunks, until
from .job_output import JobOutput
from .journal import JobEntry, JobStats
from .native_job import run_native, runs_natively
from .shards import ShardFiles
from .workspace import Workspace


def run_job(job: Job, source: WeightSource, files: ShardFiles, workspace: Workspace, stop: threading.Event) -> JobDone:
    """Convert one tensor, as many values at a time as the workspace allows.

    Raises CheckpointError for infinities and NaN in the source, ConversionError when the disk refuses, StoppedError
    when `stop` is set between chunks.
    """
    if runs_natively(job, source):
        return run_native(job, source, files, workspace, stop)
    if job.scheme is not Scheme.FLOAT or source.is_computed(job.source):
        workspace.release()  # torch may need all that the budget has
    read, output = source_digest(source, job.source), JobOutput(files, job)
    squared_error = np.zeros(job.rows)
    squared_norm = np.zeros(job.rows)
    small: dict[Slot, list[Tensor]] = {}
    for start, end in until(stop, row_chunks(job, workspace.chunk_elements, source.block_rows)):
        if job.scheme is Scheme.FLOAT:
            output.write(job.outputs[0], start, _float_rows(job, source, start, end))
            continue
        quantized = _quantized_rows(job, source, start, end)
        for slot in job.outputs:
            if slot.suffix == WEIGHT:
                output.write(slot, start, quantized.tensors[WEIGHT])
            # One value for the whole linear comes with its first rows.
            elif slot.suffix not in (INPUT_SCALE, INPUT_OFFSET) or start == 0:
                small.setdefault(slot, []).append(quantized.tensors[slot.suffix])
        squared_error[start:end] = quantized.squared_error.numpy()
        squared_norm[start:end] = quantized.squared_norm.numpy()
    # A few bytes a row: one write a tensor, not one a chunk.
    for slot, parts in small.items():
        output.write(slot, 0, torch.cat(parts))
    # One sum over all rows, however they were chunked: the result does not depend on the chunks.
    stats = JobStats(float(squared_error.sum()), float(squared_norm.sum()))
    return JobDone(JobEntry(stats, read, output.digest()))


def _quantized_rows(job: Job, source: WeightSource, start: int, end: int) -> QuantizedRows:
    if isinstance(source, QuantizedSource):
        return source.quantized_rows(job.source, start, end, row_parallel=job.row_parallel)
    stored = source.stored_rows(job.source, start, end)
    try:
        return quantize_stored(stored, job.scheme, job.method.scale_search, row_parallel=job.row_parallel)
    except NonFiniteError as error:
        raise not_finite(job.source, source) from error


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
        raise not_finite(job.source, source)
    return rows
