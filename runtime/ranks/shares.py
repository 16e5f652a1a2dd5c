"""The part of each stored tensor that a rank loads, and its division among the ranks of a tensor-parallel group."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final, NamedTuple

from ...models.family import Block, Entry
from .division import Division
from .group import Group
from .layout import Owned, sums_inputs


class Share(NamedTuple):
    """One rank's part of a linear `[outputs, inputs]`; a dimension that is whole is None.

    rows, columns: of the stored weight, loaded here. outputs, inputs: the divisions of what the linear gives and takes.
    A float linear with divided inputs has whole columns, and some of the rows.
    """

    rows: Division | None = None
    columns: Division | None = None
    inputs: Division | None = None


WHOLE: Final = Share()


@dataclass(frozen=True)
class Shares:
    """Parts of the weights that a rank loads.

    group: all ranks of the layout, of which neighbours divide heads, columns and vocabulary.
    """

    owned: Owned
    group: Group

    def of_linear(self, block: Block, entry: Entry, *, exact_sum: bool) -> Share:
        """The part of a linear. exact_sum: as of `Owned.ranges`."""
        rows, columns = (self._division(block, entry, dimension, exact_sum) for dimension in (0, 1))
        inputs = self._division(block, entry, 1, True) if sums_inputs(entry) else None
        return Share(rows, columns, inputs)

    def of_rows(self, block: Block, entry: Entry) -> Division | None:
        """The division of a tensor's first dimension."""
        return self._division(block, entry, 0, True)

    def _division(self, block: Block, entry: Entry, dimension: int, exact_sum: bool) -> Division | None:
        layout = self.owned.layout
        if layout.tp == 1 or block is Block.EXPERT:
            return None
        parts = [peer.ranges(block, entry, exact_sum=exact_sum)[dimension] for peer in self._peers]
        if parts[0] == parts[-1]:
            return None
        copies = parts.count(parts[0])
        return Division(self.group.neighbours(layout.tp), tuple(map(len, parts[::copies])), copies)

    @cached_property
    def _peers(self) -> list[Owned]:
        layout, config = self.owned.layout, self.owned.config
        return [layout.owned(config, rank) for rank in layout.tp_group(self.owned.rank)]
