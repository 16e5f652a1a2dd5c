"""Role totals: errors and bytes of a conversion by role and scheme, for npuq/report.json, the model card and the
summary."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...formats.schemes import Scheme
from ...quant.weight_error import ErrorSums, relative_error
from ..plan.plan import Job


@dataclass
class RoleTotals:
    """Sums over all tensors of one role and scheme."""

    role: str
    scheme: str
    tensors: int = 0
    parameters: int = 0
    source_bytes: int = 0
    output_bytes: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    measured: bool = False
    largest_error: float = 0.0
    largest_error_tensor: str = ""

    @property
    def relative_error(self) -> float | None:
        """√(Σ (w − ŵ)² / Σ w²) over the role; None for float, and before the conversion."""
        return relative_error(self.squared_error, self.squared_norm) if self.measured else None

    def as_dict(self) -> dict[str, object]:
        return {
            "role": self.role,
            "scheme": self.scheme,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "source_bytes": self.source_bytes,
            "output_bytes": self.output_bytes,
            "relative_error": self.relative_error,
            "largest_error": self.largest_error if self.measured else None,
            "largest_error_tensor": self.largest_error_tensor if self.measured else None,
        }


def totals_by_role(jobs: Iterable[Job], stats: Mapping[int, ErrorSums]) -> list[RoleTotals]:
    """Totals by role and scheme, largest first; errors are None for jobs without `stats` (a dry run)."""
    totals: dict[tuple[str, Scheme], RoleTotals] = {}
    for job in jobs:
        total = totals.setdefault((job.role.value, job.scheme), RoleTotals(job.role.value, job.scheme.value))
        total.tensors += 1
        total.parameters += job.rows * job.columns
        total.source_bytes += job.source_bytes
        total.output_bytes += job.output_bytes
        found = stats.get(job.index)
        if found is None or job.scheme is Scheme.FLOAT:
            continue
        total.measured = True
        total.squared_error += found.squared_error
        total.squared_norm += found.squared_norm
        error = relative_error(found.squared_error, found.squared_norm)
        if error >= total.largest_error:
            total.largest_error, total.largest_error_tensor = error, job.source
    return sorted(totals.values(), key=lambda total: (-total.source_bytes, total.role, total.scheme))
