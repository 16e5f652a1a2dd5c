"""The division of a dimension among the ranks of a group, and its whole again from the parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .group import Group


@dataclass(frozen=True)
class Division:
    """A dimension divided among the ranks of a group, in the order of the ranks.

    sizes: of each part. copies: so many neighbouring ranks have the same part; parts of several cannot be joined.
    """

    group: Group
    sizes: tuple[int, ...]
    copies: int = 1

    @property
    def total(self) -> int:
        """The size of the whole dimension."""
        return sum(self.sizes)

    @property
    def own(self) -> range:
        """The part of this rank."""
        place = self.group.rank // self.copies
        first = sum(self.sizes[:place])
        return range(first, first + self.sizes[place])

    def join(self, columns: Tensor) -> Tensor:
        """Join the columns of all ranks: `[T, own]` → `[T, total]`, contiguous."""
        return self.group.all_gather_rows(columns.t().contiguous(), self.sizes).t().contiguous()

    def join_at_first(self, columns: Tensor) -> Tensor:
        """Join the columns of all ranks at rank 0: `[T, own]` → `[T, total]`, contiguous; elsewhere → `[0, total]`."""
        first = self.group.rank == 0
        joined = self.group.all_to_all_rows(
            columns.t().contiguous(),
            self._at_first(self.sizes[self.group.rank]),
            self.sizes if first else [0] * self.group.size,
        )
        return joined.t().contiguous() if first else columns.new_empty(0, self.total)

    def _at_first(self, count: int) -> Sequence[int]:
        return [count, *[0] * (self.group.size - 1)]


def add_bits(rows: Tensor, group: Group) -> Tensor:
    """Add floats of which every rank but one has zeros: `[T, H]` → `[T, H]`, the same bits, −0 and NaN among them."""
    if rows.shape[-1] * rows.element_size() % 4:
        return add_bits(torch.nn.functional.pad(rows, (0, 1)), group)[:, :-1]
    return group.all_reduce_sum(rows.contiguous().view(torch.int32)).view(rows.dtype)
