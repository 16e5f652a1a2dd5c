"""The weight error of linears against the source, and of whole roles: one measure, with one name everywhere.

It is √(Σ (w − ŵ)² / Σ w²), the error of the dequantized weights relative to those of the source. A role's sums run over
all its weights together; a mean of its linears' errors would be another number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..formats.schemes import Scheme
from ..quant.weight_error import relative_error

if TYPE_CHECKING:
    from .values import WeightCheck


@dataclass(frozen=True)
class LinearError:
    """The weight error of one quantized linear."""

    name: str
    role: str
    scheme: str
    relative_error: float


@dataclass(frozen=True)
class RoleError:
    """The weight error of all linears of a role and scheme together, and the largest error of a linear among them."""

    role: str
    scheme: str
    linears: int
    relative_error: float
    largest_error: float
    largest_error_tensor: str


def linear_errors(schemes: Mapping[str, Scheme], checks: Iterable[WeightCheck]) -> Iterator[LinearError]:
    """The error of every linear that was compared with its source."""
    for check in checks:
        if check.sums is not None:
            error = check.sums.relative_error
            name = check.spec.name
            yield LinearError(name, check.spec.role.value, schemes[name].value, error)


def role_errors(schemes: Mapping[str, Scheme], checks: Iterable[WeightCheck]) -> Iterator[RoleError]:
    """The error of every role and scheme with compared linears, in the order of their first."""
    groups: dict[tuple[str, str], list[WeightCheck]] = {}
    for check in checks:
        if check.sums is not None:
            groups.setdefault((check.spec.role.value, schemes[check.spec.name].value), []).append(check)
    for (role, scheme), members in groups.items():
        sums = [member.sums for member in members if member.sums is not None]
        errors = [one.relative_error for one in sums]
        total = relative_error(sum(one.squared_error for one in sums), sum(one.squared_norm for one in sums))
        worst = max(range(len(errors)), key=errors.__getitem__)
        yield RoleError(role, scheme, len(members), total, errors[worst], members[worst].spec.name)
