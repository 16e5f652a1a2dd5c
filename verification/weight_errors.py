"""The weight error of linears against the source, and of whole roles: one measure, under one name wherever it is shown.

It is √(Σ (w − ŵ)² / Σ w²), the error of the dequantized weights relative to those of the source. A role's sums run over
all its weights together; a mean of its linears' errors would be another number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ..formats.schemes import Scheme
from ..quant.weight_error import relative_error
from .values import TensorCheck


@dataclass(frozen=True)
class LinearError:
    """The weight error of one quantized linear."""

    name: str
    role: str
    scheme: str
    relative_error: float


@dataclass(frozen=True)
class RoleError:
    """The weight error of all linears of a role and scheme together, and the largest of one of them."""

    role: str
    scheme: str
    linears: int
    relative_error: float
    largest_error: float
    largest_error_tensor: str


def linear_errors(schemes: Mapping[str, Scheme], checks: Iterable[TensorCheck]) -> Iterator[LinearError]:
    """The error of every linear that was compared with its source."""
    for check in checks:
        if check.stats is not None:
            error = check.stats.relative_error
            name = check.spec.name
            yield LinearError(name, check.spec.role.value, schemes[name].value, error)


def role_errors(schemes: Mapping[str, Scheme], checks: Iterable[TensorCheck]) -> Iterator[RoleError]:
    """The error of every role and scheme that has such linears, in the order of their first."""
    groups: dict[tuple[str, str], list[TensorCheck]] = {}
    for check in checks:
        if check.stats is not None:
            groups.setdefault((check.spec.role.value, schemes[check.spec.name].value), []).append(check)
    for (role, scheme), members in groups.items():
        stats = [member.stats for member in members if member.stats is not None]
        errors = [one.relative_error for one in stats]
        total = relative_error(sum(one.squared_error for one in stats), sum(one.squared_norm for one in stats))
        worst = max(range(len(errors)), key=errors.__getitem__)
        yield RoleError(role, scheme, len(members), total, errors[worst], members[worst].spec.name)
