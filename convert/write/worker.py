"""One job, executed: read rows, quantize them, write each result into its slot, in chunks of bounded size."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from ...deferred import torch
from ...dtypes import torch_dtype
from ...formats.digests import source_digest
from ...formats.schemes import INPUT_OFFSET, INPUT_SCALE, WEIGHT, QuantizedRows, Scheme, quantize_stored
from ...formats.sources.weights import Weight, WeightSource, not_finite
from ...models.roles import Role
from ...parallel.torch_threads import one_torch_thread
from ...quant.scales import NonFiniteError
from ...quant.stored_rows import row_ranges
from ...quant.weight_error import ErrorSums
from ..plan.plan import Job, Slot
from .jobs import JobDone, JobOutput, bytes_of, until
from .journal import JobEntry
from .native_job import run_native, runs_natively
from .shards import ShardFiles
from .workspace import Workspace

if TYPE_CHECKING:
    from torch import Tensor


def run_job(job: Job, source: WeightSource, files: ShardFiles, workspace: Workspace, stop: threading.Event) -> JobDone:
    """Convert one tensor, in chunks of as many values as the workspace allows.

    Raises CheckpointError for infinities and NaN in the source, ConversionError when the disk refuses, StoppedError
    when `stop` is set between chunks.
    """
    weight = source.weights[job.source]
    stored = weight.row_bytes() if runs_natively(job) else None
    done = None if stored is None else run_native(job, weight, stored, files, workspace, stop)
    if done is not None:
        return done
    one_torch_thread()
    workspace.release()  # torch may need the whole budget
    read, output = source_digest(source, job.source), JobOutput(files, job)
    squared_error = np.zeros(job.rows)
    squared_norm = np.zeros(job.rows)
    small: dict[Slot, list[Tensor]] = {}
    for start, end in until(stop, row_ranges(job.rows, job.columns, workspace.chunk_elements, weight.block_rows)):
        if job.scheme is Scheme.FLOAT:
            output.write(job.outputs[0], start, bytes_of(_float_rows(job, weight, start, end)))
            continue
        quantized = _quantized_rows(job, weight, start, end)
        for slot in job.outputs:
            if slot.suffix == WEIGHT:
                output.write(slot, start, bytes_of(quantized.tensors[WEIGHT]))
            # A value for the whole linear comes with its first rows.
            elif slot.suffix not in (INPUT_SCALE, INPUT_OFFSET) or start == 0:
                small.setdefault(slot, []).append(quantized.tensors[slot.suffix])
        squared_error[start:end] = quantized.squared_error.numpy()
        squared_norm[start:end] = quantized.squared_norm.numpy()
    # A few bytes a row: one write a tensor and not one a chunk.
    for slot, parts in small.items():
        output.write(slot, 0, bytes_of(torch.cat(parts)))
    # One sum over all rows, however they were chunked: the result does not depend on the chunks.
    stats = ErrorSums(float(squared_error.sum()), float(squared_norm.sum()))
    return JobDone(JobEntry(stats, read, output.digest()))


def _quantized_rows(job: Job, weight: Weight, start: int, end: int) -> QuantizedRows:
    if weight.linear is not None:
        return weight.linear.quantized_rows(start, end, row_parallel=job.row_parallel)
    rows = weight.rows(start, end)
    try:
        return quantize_stored(rows, job.scheme, job.method.scale_search, row_parallel=job.row_parallel)
    except NonFiniteError as error:
        raise not_finite(weight) from error


def _float_rows(job: Job, weight: Weight, start: int, end: int) -> Tensor:
    rows = weight.rows(start, end).to(torch_dtype(job.outputs[0].dtype))
    # Unknown tensors may hold any value; in a known one an infinity is damage.
    if job.role is not Role.OTHER and not torch.isfinite(rows).all():
        raise not_finite(weight)
    return rows
