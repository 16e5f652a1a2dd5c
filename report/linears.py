"""The facts of a quantized linear, and of all tensors of a role."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

from ..models.family import Block
from ..models.tensors import Spec


@dataclass(frozen=True)
class LinearFacts:
    """A quantized linear; `projection` is its name within its layer or expert.

    relative_error: √(Σ (w − ŵ)² / Σ w²) of its weight. output_error: √(Σ ‖x(w − ŵ)ᵀ‖² / Σ ‖xwᵀ‖²) over its calibration
    inputs x. None where they are not known.
    """

    name: str
    role: str
    scheme: str
    layer: int
    expert: int | None
    projection: str
    relative_error: float | None
    output_error: float | None


@dataclass(frozen=True)
class RoleFacts:
    """Sums over all tensors of a role and scheme.

    `source_bytes` and `relative_error` are None where they are not known, the error also for float.
    """

    role: str
    scheme: str
    tensors: int
    parameters: int
    source_bytes: int | None
    output_bytes: int
    relative_error: float | None


def linear_facts(
    spec: Spec, scheme: str, relative_error: float | None = None, output_error: float | None = None
) -> LinearFacts:
    """The facts of a linear that the architecture knows. Raises ValueError for one outside the layers."""
    if spec.layer is None:
        raise ValueError(f"{spec.name}: belongs to no layer")
    return LinearFacts(
        name=spec.name,
        role=spec.role.value,
        scheme=scheme,
        layer=spec.layer,
        expert=spec.expert,
        projection=f"shared {spec.module}" if spec.block is Block.SHARED else spec.module,
        relative_error=relative_error,
        output_error=output_error,
    )


def root_mean_square(errors: Sequence[float | None]) -> float | None:
    """The root mean square of these errors; None without any, and where one is not known."""
    known = [error for error in errors if error is not None]
    return sqrt(sum(error**2 for error in known) / len(known)) if known and len(known) == len(errors) else None
