"""Linears that share their inputs, calibrated together: the Hessian of their inputs, then codes, then the file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....dtypes import torch_dtype
from ....errors import CalibrationError, CheckpointError
from ....formats.schemes import SCALE, WEIGHT, QuantizedRows, Scheme, dequantize, linear_tensors, quantize_stored
from ....formats.static_w8a8 import InputScale, static_tensors
from ....parallel.pool import Mapper
from ....quant.arithmetic import Arithmetic
from ....quant.hessian import Factor, Hessian, SingularHessianError, factor
from ....quant.refine import Calibrated, calibrated_codes, output_error
from ....quant.scales import Method, NonFiniteError
from ....quant.stored_rows import StoredRows
from ....quant.weight_error import ErrorSums, added
from ...plan.plan import Job
from ...write.jobs import JobOutput, bytes_of
from ...write.shards import ShardFiles
from .operators import Deployed, round_inputs

if TYPE_CHECKING:
    from ..ranks.pool import RankedPool

# Rows for one call of GPTQ. Fixed, so that results do not depend on the number of threads.
_ROWS = 512

Inputs = Callable[[int], Tensor]
"""The inputs of some linears in the batch of that index: float32 [T, K], as the quantized model computes them."""


@dataclass(frozen=True)
class JobResult:
    """The result of a written job: its error sums, and the digest of its bytes (none in a trial)."""

    stats: ErrorSums
    digest: bytes


class Linears:
    """Quantizes linears of a plan and writes them into its shards, if there are any. Thread-safe."""

    def __init__(self, files: ShardFiles | None, arithmetic: Arithmetic):
        self._files = files
        self.arithmetic = arithmetic

    def trial(self) -> Linears:
        """The same without files."""
        return Linears(None, self.arithmetic)

    def _write(self, job: Job, tensors: Mapping[str, Tensor]) -> bytes:
        """Write all tensors of a job, by the suffixes of their names; return the digest."""
        if self._files is None:
            return b""
        output = JobOutput(self._files, job)
        for slot in job.outputs:
            output.write(slot, 0, bytes_of(tensors[slot.suffix]))
        return output.digest()

    def float(self, job: Job, tensor: Tensor) -> tuple[Tensor, JobResult]:
        """Write a tensor that stays float, in the dtype of its slot; return the written values as float32."""
        stored = self.rounded(job, tensor).reshape(job.shape)
        if not bool(torch.isfinite(stored).all()):
            raise _overflow_error(job, stored.dtype)
        digest = self._write(job, {job.outputs[0].suffix: stored})
        return stored.to(torch.float32), JobResult(ErrorSums(0.0, float(tensor.double().square().sum())), digest)

    def rounded(self, job: Job, tensor: Tensor) -> Tensor:
        """Round a tensor to the dtype that its job stores it in."""
        return tensor.to(torch_dtype(job.outputs[0].dtype))

    def quantize(
        self,
        job: Job,
        weight: Tensor,
        hessian: Hessian | None,
        factored: Factor | None,
        inputs: InputScale | None,
        mapper: Mapper,
    ) -> tuple[Deployed, JobResult]:
        """Quantize a weight float32 [N, K] and write it.

        GPTQ where the job asks for it and `factored` is given; else the job's data-free method (mse for GPTQ).
        """
        if job.scheme is Scheme.FLOAT:
            stored, written = self.float(job, weight)
            return Deployed(job.source, job.scheme, stored), written
        base = Scheme.W8A8 if job.scheme is Scheme.W8A8_STATIC else job.scheme
        rows = _round(job, weight, base, mapper)
        tensors, lost = dict(rows.tensors), None
        if job.method is Method.GPTQ and factored is not None:
            scale = rows.tensors[SCALE][:, 0]
            starts = range(0, weight.shape[0], _ROWS)

            def some(start: int) -> Calibrated:
                part = slice(start, start + _ROWS)
                return calibrated_codes(weight[part], factored, scale[part], base.weight_bits, self.arithmetic)

            parts = list(mapper.map(some, starts))
            codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
            tensors = linear_tensors(codes, scales, base, row_parallel=job.row_parallel)
            lost = tuple(
                added(float(part.sum()) for part in sums)
                for sums in ([part.squared_error for part in parts], [part.squared_norm for part in parts])
            )
        found = dequantize(tensors, base)
        if job.scheme is Scheme.W8A8_STATIC:
            assert inputs is not None
            float16 = any(slot.dtype == "I64" for slot in job.outputs)
            tensors = static_tensors(tensors[WEIGHT], tensors[SCALE], inputs, float16=float16)
        digest = self._write(job, tensors)
        squared_error = float(rows.squared_error.sum()) if lost is None else _squared_error(weight, found)
        if lost is None and hessian is not None and hessian.rows:
            lost = output_error(weight, found, hessian.symmetric(), self.arithmetic)
        error = None if lost is None else _relative_error(*lost)
        stats = ErrorSums(squared_error, float(rows.squared_norm.sum()))
        return Deployed(job.source, job.scheme, found, inputs=inputs, error=error), JobResult(stats, digest)


def _round(job: Job, weight: Tensor, scheme: Scheme, mapper: Mapper) -> QuantizedRows:
    """`quantize_stored`, some rows at a time: its working memory is many times their size."""

    def some(part: Tensor) -> QuantizedRows:
        return quantize_stored(StoredRows(part), scheme, job.method.scale_search, row_parallel=job.row_parallel)

    try:
        parts = list(mapper.map(some, weight.split(_ROWS)))
    except NonFiniteError as error:
        raise _overflow_error(job, weight.dtype) from error
    return QuantizedRows(
        {suffix: torch.cat([part.tensors[suffix] for part in parts]) for suffix in parts[0].tensors},
        torch.cat([part.squared_error for part in parts]),
        torch.cat([part.squared_norm for part in parts]),
    )


def _relative_error(lost: float, whole: float) -> float:
    """√(lost / whole); 0 where rounding or inputs that are no numbers leave nothing to compare."""
    return math.sqrt(max(lost, 0.0) / whole) if whole > 0 and math.isfinite(lost) else 0.0


def _overflow_error(job: Job, dtype: torch.dtype) -> CheckpointError:
    """The error for a weight that overflows its dtype: `Layer.weight` found it finite."""
    kind = str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"tensor {job.source!r} outgrows {kind} once it is rotated or smoothed; leave that out of the method"
    )


def _squared_error(weight: Tensor, found: Tensor) -> float:
    """Σ (w − ŵ)² in float64, with only some rows in memory at a time."""
    parts = zip(weight.split(_ROWS), found.split(_ROWS), strict=True)
    return added(float((part.double() - other.double()).square().sum()) for part, other in parts)


def measure(
    jobs: Sequence[Job], inputs: Inputs, batches: Iterable[int], arithmetic: Arithmetic, pool: RankedPool
) -> tuple[Hessian | None, InputScale | None]:
    """The Hessian and the static input scale that these jobs need for their common inputs; None: not needed."""
    batches, scale = list(batches), None
    if any(job.scheme is Scheme.W8A8_STATIC for job in jobs):
        ranges = pool.gathered(lambda batch: tuple(map(float, torch.aminmax(inputs(batch)))), batches)
        low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CalibrationError(
                f"the inputs of {jobs[0].source!r} are no numbers; the checkpoint is damaged, or its config.json is "
                "another model's"
            )
        scale = InputScale.of_range(low, high)
    if not any(job.method is Method.GPTQ and job.scheme is not Scheme.FLOAT for job in jobs):
        return None, scale
    scheme = jobs[0].scheme
    hessian: Hessian | None = None
    pieces = len(Hessian.starts(jobs[0].shape[1]))
    for x in pool.map(lambda batch: round_inputs(inputs(batch), scheme, scale), batches, readers=pieces):
        hessian = hessian or Hessian(x.shape[1], arithmetic)
        hessian.add(x, pool.local, pool.mine)
    if hessian is not None:
        for index, piece in enumerate(hessian.pieces()):
            pool.share(index, piece)
    return hessian, scale


def factored(
    hessian: Hessian | None, arithmetic: Arithmetic, mapper: Mapper, divided: Mapper | None = None
) -> Factor | None:
    """The factor of a Hessian (`factor`); None without a Hessian, and for one that cannot be factored."""
    if hessian is None or not hessian.rows:
        return None
    try:
        return factor(hessian.symmetric(), arithmetic, mapper, divided=divided)
    except SingularHessianError:
        return None
