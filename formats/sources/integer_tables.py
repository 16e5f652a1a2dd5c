"""Tables of integers in a checkpoint: they belong where the family's table has them, and floats do not.

The numbers of some are indices, which loaders use unchecked: a token's experts. Whoever reads them checks them here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...dtypes import INTEGER_CODES
from ...errors import CheckpointError
from ...models.roles import Role
from ...models.tensors import Spec
from ...quant.stored_rows import StoredRows
from .weights import DerivedWeight, RowBytes, Weight, WeightSource

if TYPE_CHECKING:
    from torch import Tensor


def with_checked_tables(source: WeightSource, specs: Mapping[str, Spec]) -> WeightSource:
    """The source with tables of indices that are checked where they are read.

    Raises CheckpointError for integers where the model has floats, and for floats where it has integers.
    """
    weights = dict(source.weights)
    for name, spec in specs.items():
        if spec.role is Role.OTHER:  # copied as it is
            continue
        dtype = weights[name].dtype
        wanted = spec.kept_dtype if spec.kept_dtype in INTEGER_CODES else None
        if dtype != wanted if wanted else dtype in INTEGER_CODES:
            raise CheckpointError(
                f"{weights[name].file}: tensor {name!r} is {dtype}; it must be {wanted or 'of floats'}: fetch that "
                "shard again"
            )
        weights[name] = checked_table(weights[name], spec)
    return replace(source, weights=weights)


def checked_table(weight: Weight, spec: Spec) -> Weight:
    """The weight, which raises CheckpointError where rows with an index outside its range are read."""
    return weight if spec.indices is None else IndexTable(weight, spec.indices)


def check_indices(rows: Tensor, count: int, name: str, file: Path) -> None:
    """Raise CheckpointError for a number outside 0 to `count` − 1 in rows of a table."""
    if not rows.numel():
        return
    least, greatest = (int(bound) for bound in rows.aminmax())
    if least < 0 or greatest >= count:
        wrong = least if least < 0 else greatest
        raise CheckpointError(
            f"{file}: tensor {name!r} has the number {wrong}, and must have 0 to {count - 1} by config.json; one of "
            "them is damaged or another model's: fetch both again"
        )


@dataclass(frozen=True, slots=True)
class IndexTable(DerivedWeight):
    """A `Weight` of int64 numbers from 0 to `count` − 1."""

    count: int

    @property
    def name(self) -> str:
        return self.inner.name

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        stored = self.inner.rows(start, stop)
        check_indices(stored.rows, self.count, self.name, self.file)
        return stored

    def view(self) -> Tensor | None:
        table = self.inner.view()
        if table is not None:
            check_indices(table, self.count, self.name, self.file)
        return table

    def row_bytes(self) -> RowBytes | None:
        return None
