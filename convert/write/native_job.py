"""One job on the native kernels: bytes are read, quantized or decoded, and written, without a tensor for each chunk.

A chunk sweeps a core's caches, so that Python's work for the next one costs several times its cost in a tight loop:
with tensors 0.3 ms, where a chunk takes 0.6 to convert. Fresh memory would cost a page fault for each 4 KB.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...dtypes import array_dtype
from ...formats.digests import Digest
from ...formats.schemes import BIAS, SCALE, WEIGHT, Scheme, is_native
from ...formats.sources.weights import RowBytes, Weight, not_finite
from ...models.roles import Role
from ...native import library as native
from ...native.quantization import DECODED, MOST_COLUMNS, NUMBERS, NativeRows, Quantizer, are_finite, decode_rows
from ...quant.scales import Method, NonFiniteError
from ...quant.stored_rows import row_ranges
from ...quant.weight_error import ErrorSums
from ..plan.plan import Job, Slot
from .jobs import JobDone, JobOutput, memory_of, until
from .journal import JobEntry
from .shards import ShardFiles
from .workspace import Workspace, Written

if TYPE_CHECKING:
    from numpy.typing import NDArray

# A value needs its own bytes and those of its code here; `workspace.chunk_elements` allows for torch's larger need.
# With chunks of twice the size, Python has half the work.
_CHUNK = 2


def runs_natively(job: Job) -> bool:
    """True for a job that `run_native` can do, if the kernels can read its rows."""
    if job.rows == 0:
        return False
    if job.scheme is not Scheme.FLOAT:
        return is_native(job.scheme, job.columns)
    # An unknown tensor may hold infinities, which the kernels refuse.
    return job.role is not Role.OTHER and job.columns > 0 and native.library() is not None


def run_native(
    job: Job, weight: Weight, stored: RowBytes, files: ShardFiles, workspace: Workspace, stop: threading.Event
) -> JobDone | None:
    """Run a job as `worker.run_job` does; `stored` has the weight's bytes as they are in the file.

    None, before anything is read, for a job that the kernels do not take after all.
    """
    if stored.dtype not in NUMBERS:
        return None
    if job.scheme is not Scheme.FLOAT:
        return _quantized(job, weight, stored, files, workspace, stop)
    code = job.outputs[0].dtype
    if stored.dtype != code and (code not in DECODED or job.columns > MOST_COLUMNS):
        return None
    return _decoded(job, weight, stored, files, workspace, stop)


class _Reading:
    """The rows of a weight, read chunk by chunk into one memory, and their digest."""

    def __init__(self, job: Job, stored: RowBytes, weight: Weight, workspace: Workspace, stop: threading.Event):
        elements = _CHUNK * workspace.chunk_elements
        self._chunks = list(row_ranges(job.rows, job.columns, elements, weight.block_rows))
        self._stored, self._stop = stored, stop
        self._row_bytes = stored.nbytes // job.rows
        self._digest = Digest()
        self.most = self._chunks[0][1]
        self.rows = workspace.read(self.most * self._row_bytes).reshape(self.most, self._row_bytes)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of rows; the first of `rows` hold them then."""
        memory = memory_of(self.rows)
        for start, end in until(self._stop, iter(self._chunks)):
            piece = memory[: (end - start) * self._row_bytes]
            self._stored.read(start * self._row_bytes, piece)
            self._digest.update(piece)
            yield start, end

    def digest(self) -> bytes:
        """The digest of all stored bytes behind the weight, in the order of `weight.stored_names`."""
        for array in self._stored.beside:
            self._digest.update(memory_of(array))
        return self._digest.result()


def _quantized(
    job: Job, weight: Weight, stored: RowBytes, files: ShardFiles, workspace: Workspace, stop: threading.Event
) -> JobDone:
    reading, output = _Reading(job, stored, weight, workspace, stop), JobOutput(files, job)
    slots = {slot.suffix: slot for slot in job.outputs}
    code_slot = slots.pop(WEIGHT)
    packed = job.rows // code_slot.shape[0]  # rows of the weight in a row of codes
    keep = code_slot.nbytes <= workspace.kept_bytes
    # Whole tensors for everything but the codes, which may be too large. Offsets stay 0.
    small = {suffix: np.zeros(slot.shape, array_dtype(slot.dtype)) for suffix, slot in slots.items()}
    error, norm = np.zeros((2, job.rows))
    codes = workspace.codes(code_slot.shape[0] if keep else reading.most // packed, job.columns)
    out = NativeRows(codes, small[SCALE], small.get(BIAS), error, norm)
    mse = job.method.scale_search is Method.MSE
    quantizer = Quantizer(stored.rows_in(reading.rows), job.scheme.weight_bits, mse, out)
    code_memory = memory_of(codes)
    for start, end in reading.chunks():
        first = start // packed if keep else 0
        try:
            quantizer.run(start, end - start, first)
        except NonFiniteError as problem:
            raise not_finite(weight) from problem
        last = first + (end - start) // packed
        output.write(code_slot, start, code_memory[first * job.columns : last * job.columns])
    # A few bytes a row: one write a tensor and not one a chunk.
    for suffix, array in small.items():
        output.write(slots[suffix], 0, memory_of(array))
    # One sum over all rows, however they were chunked: the result does not depend on the chunks.
    entry = JobEntry(ErrorSums(float(error.sum()), float(norm.sum())), reading.digest(), output.digest())
    if not keep:
        return JobDone(entry)
    written = _written([(slots[suffix], array) for suffix, array in small.items()] + [(code_slot, codes)])
    if written is not None:
        workspace.lend(written)
    return JobDone(entry, written)


def _decoded(
    job: Job, weight: Weight, stored: RowBytes, files: ShardFiles, workspace: Workspace, stop: threading.Event
) -> JobDone:
    """A float weight in the dtype of its slot: its bytes as they are where that is the stored dtype."""
    reading, output = _Reading(job, stored, weight, workspace, stop), JobOutput(files, job)
    (slot,) = job.outputs
    same = stored.dtype == slot.dtype
    rows = reading.rows if same else np.empty((reading.most, job.columns), array_dtype(slot.dtype))
    for start, end in reading.chunks():
        if same:
            if not are_finite(reading.rows[: end - start].reshape(-1), stored.dtype):
                raise not_finite(weight)
        else:
            try:
                decode_rows(stored.rows_in(reading.rows[: end - start], start), slot.dtype, rows[: end - start])
            except NonFiniteError as problem:
                raise not_finite(weight) from problem
        output.write(slot, start, memory_of(rows[: end - start]))
    return JobDone(JobEntry(ErrorSums(0.0, 0.0), reading.digest(), output.digest()))


def _written(arrays: list[tuple[Slot, NDArray[Any]]]) -> Written | None:
    """A job's outputs as contiguous bytes of the file; None where other bytes are between them."""
    arrays.sort(key=lambda pair: pair[0].start)
    if any(slot.start + slot.nbytes != after.start for (slot, _), (after, _) in pairwise(arrays)):
        return None
    return Written(arrays[0][0].start, [memory_of(array) for _, array in arrays])
