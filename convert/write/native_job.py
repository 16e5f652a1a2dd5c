"""One job on the native kernels: bytes are read, quantized and written, without a tensor for each chunk.

A chunk sweeps a core's caches, so that Python's work for the next one costs several times its cost in a tight loop:
with tensors 0.3 ms, where a chunk takes 0.6 to convert. Fresh memory would cost a page fault for each 4 KB.
"""

from __future__ import annotations

import threading
from itertools import pairwise

import torch
from torch import Tensor

from ...formats.digests import Digest
from ...formats.safetensors import DTYPES
from ...formats.schemes import BIAS, SCALE, WEIGHT, Scheme, is_native
from ...formats.sources.weights import RowBytes, Weight, not_finite
from ...native.binding import NativeRows, Quantizer
from ...quant.scales import Method, NonFiniteError
from ...quant.stored_rows import StoredRows, row_ranges
from ...quant.weight_error import ErrorSums
from ..plan.plan import Job, Slot
from .jobs import JobDone, JobOutput, memory_of, until
from .journal import JobEntry
from .shards import ShardFiles
from .workspace import Workspace, Written

# A value needs its own bytes and those of its code here; `workspace.chunk_elements` allows for torch's larger need.
# With chunks of twice the size, Python has half the work.
_CHUNK = 2


def runs_natively(job: Job) -> bool:
    """True for a job that `run_native` can do, if the kernels can read its rows."""
    return job.scheme is not Scheme.FLOAT and job.rows > 0 and is_native(job.scheme, job.columns)


def run_native(
    job: Job, weight: Weight, stored: RowBytes, files: ShardFiles, workspace: Workspace, stop: threading.Event
) -> JobDone:
    """Run a job as `worker.run_job` does; `stored` has the weight's bytes as they are in the file."""
    chunks = list(row_ranges(job.rows, job.columns, _CHUNK * workspace.chunk_elements, weight.block_rows))
    slots = {slot.suffix: slot for slot in job.outputs}
    code_slot, most = slots.pop(WEIGHT), chunks[0][1]
    packed = job.rows // code_slot.shape[0]  # rows of the weight in a row of codes
    keep = code_slot.nbytes <= workspace.kept_bytes
    # Whole tensors for everything but the codes, which may be too large. Offsets stay 0.
    small = {suffix: torch.zeros(slot.shape, dtype=DTYPES[slot.dtype]) for suffix, slot in slots.items()}
    error, norm = torch.zeros(2, job.rows, dtype=torch.float64)
    codes = workspace.codes(code_slot.shape[0] if keep else most // packed, job.columns)
    row_bytes = stored.nbytes // job.rows
    rows = workspace.read(most * row_bytes)
    read, output = Digest(), JobOutput(files, job)
    piece_rows = StoredRows(rows.view(stored.dtype).view(most, -1), stored.blocks)
    out = NativeRows(codes, small[SCALE], small.get(BIAS), error, norm)
    mse = job.method.scale_search is Method.MSE
    quantizer = Quantizer(piece_rows, job.scheme.weight_bits, mse, out)
    memory, code_memory = memory_of(rows), memory_of(codes)
    for start, end in until(stop, iter(chunks)):
        piece = memory[: (end - start) * row_bytes]
        stored.read(start * row_bytes, piece)
        read.update(piece)
        first = start // packed if keep else 0
        try:
            quantizer.run(start, end - start, first)
        except NonFiniteError as problem:
            raise not_finite(weight) from problem
        last = first + (end - start) // packed
        output.write_bytes(code_slot, start, code_memory[first * job.columns : last * job.columns])
    # A few bytes a row: one write a tensor and not one a chunk.
    for suffix, tensor in small.items():
        output.write(slots[suffix], 0, tensor)
    # One sum over all rows, however they were chunked: the result does not depend on the chunks.
    stats = ErrorSums(float(error.numpy().sum()), float(norm.numpy().sum()))
    for tensor in ([] if stored.scale is None else [stored.scale]) + list(stored.beside):
        read.update(memory_of(tensor))  # in the order of `weight.stored_names`
    entry = JobEntry(stats, read.result(), output.digest())
    if not keep:
        return JobDone(entry)
    written = _written([(slots[suffix], tensor) for suffix, tensor in small.items()] + [(code_slot, codes)])
    if written is not None:
        workspace.lend(written)
    return JobDone(entry, written)


def _written(tensors: list[tuple[Slot, Tensor]]) -> Written | None:
    """A job's outputs as contiguous bytes of the file; None where other bytes are between them."""
    tensors.sort(key=lambda pair: pair[0].start)
    if any(slot.start + slot.nbytes != after.start for (slot, _), (after, _) in pairwise(tensors)):
        return None
    return Written(tensors[0][0].start, [memory_of(tensor) for _, tensor in tensors])
