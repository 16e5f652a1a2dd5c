"""The error that int4 with one scale a channel adds to FP4 weights, beside what min-max scales would add."""

from __future__ import annotations

from typing import Any, Final

from ...formats.schemes import Scheme, quantize_stored
from ...formats.sources.fp4 import Fp4Weight
from ...quant.scales import Method
from ...quant.weight_error import ErrorSums
from ..plan.prepare import Prepared

_TENSORS: Final = 64
_ROWS: Final = 8


def fp4_error(prepared: Prepared) -> dict[str, Any]:
    """The manifest's entry `fp4_error`: weight errors of `mse` and of `minmax` on the first rows of some weights.

    Empty without FP4 weights that became int4 by `mse`, and for a checkpoint on a hub, whose weights have passed by.
    """
    weights = prepared.source.weights
    jobs = [
        job
        for job in prepared.plan.jobs
        if job.scheme is Scheme.W4A8 and job.method is Method.MSE and isinstance(weights[job.source], Fp4Weight)
    ]
    if not jobs or prepared.checkpoint.window is not None:
        return {}
    chosen = jobs[:: -(-len(jobs) // _TENSORS)]
    errors, rows_read = {}, 0
    for method in (Method.MSE, Method.MINMAX):
        error = norm = 0.0
        rows_read = 0
        for job in chosen:
            rows = weights[job.source].rows(0, min(job.rows, _ROWS))
            made = quantize_stored(rows, job.scheme, method, row_parallel=job.row_parallel)
            error += float(made.squared_error.sum())
            norm += float(made.squared_norm.sum())
            rows_read += rows.rows.shape[0]
        errors[method.value] = ErrorSums(error, norm).relative_error
    return {"fp4_error": {"rows": rows_read, **errors}}
