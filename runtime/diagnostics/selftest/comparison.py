"""Comparison of a backend with the reference, operator by operator, on small random data: run it first on a new NPU.

A case builds its inputs with the backend's own operators (weight layouts included) and returns tensors. Errors are
relative to the largest value; int8 codes may differ by one, for quotients on a rounding tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ....errors import BackendError
from ....inputs.printable import error_line
from ...ops import (
    Activation,
    Ops,
    Quantized,
)
from ...ops.reference import ReferenceOps
from .cases import CASES, INT8_CACHE_CASES
from .data import Case

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 2e-2}


@dataclass(frozen=True)
class Result:
    """Result of one operator. error: relative to the largest reference value. message: set if the operator failed.

    findings: what its case showed of the device besides (`Ops.findings`).
    """

    operator: str
    error: float | None
    tolerance: float
    message: str = ""
    findings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.error is not None and self.error <= self.tolerance


def selftest(ops: Ops) -> Iterator[Result]:
    """Run every case that `ops` supports, on `ops` and on the reference in the same compute dtype."""
    reference = ReferenceOps(ops.dtype)
    tolerance = TOLERANCE[ops.dtype]
    known: list[str] = []
    for name, case in cases_of(ops).items():
        try:
            ours = case(ops)
        except (BackendError, RuntimeError, TypeError) as error:
            yield Result(name, None, tolerance, error_line(error, 300))
            continue
        theirs = case(reference)
        fresh = [finding for finding in ops.findings() if finding not in known]
        known += fresh
        yield Result(name, max(map(_error, ours, theirs)), tolerance, findings=tuple(fresh))


def cases_of(ops: Ops) -> dict[str, Case]:
    """Cases of a backend in its settings; those of an int8 cache only where the backend has one."""
    return {name: case for name, case in CASES.items() if ops.caches.takes_int8 or name not in INT8_CACHE_CASES}


def _error(ours: Activation, theirs: Activation) -> float:
    """Greatest difference over the greatest magnitude; infinite for unequal shapes and values not finite."""
    if isinstance(ours, Quantized) and isinstance(theirs, Quantized):
        off = (ours.codes.cpu().int() - theirs.codes.int()).abs()
        ties_only = bool(off.max() <= 1) and float(off.float().mean()) < 0.02
        return _error(ours.scale, theirs.scale) if ties_only else float("inf")
    assert isinstance(ours, Tensor) and isinstance(theirs, Tensor)
    a, b = ours.cpu().double(), theirs.double()
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
