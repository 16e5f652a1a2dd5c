"""A pool over ranks: each rank computes its part of the items on its own threads, and all get the results in order.

All ranks call the same methods with equal arguments, from one thread. Results are moved, and never combined: what is
summed is summed in one order, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ....parallel.pool import Pool
from ....runtime.ranks.group import Group
from .values import decoded, encoded

Item = TypeVar("Item")
Result = TypeVar("Result")


class RankedPool:
    """The pool of one rank; `local` are its threads. Of one rank alone, it is what they are.

    Item i, and expert i, are computed by rank i mod size.
    """

    def __init__(self, local: Pool, group: Group):
        self.local = local
        self.inline = local.inline
        self._group = group

    @property
    def rank(self) -> int:
        return self._group.rank

    @property
    def size(self) -> int:
        return self._group.size

    def mine(self, index: int) -> bool:
        """True for an item of this rank."""
        return index % self.size == self.rank

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Yield the results in the order of `items`."""
        listed = list(items)
        own = self.begin(function, [item for index, item in enumerate(listed) if self.mine(index)])
        for index in range(len(listed)):
            yield self._given(next(own) if self.mine(index) else None, index % self.size)

    def begin(self, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
        """Begin to compute items on this rank's threads; return an iterator of the results, which others do not get."""
        return self.local.begin(function, items)

    def each(self, function: Callable[[Item], object], items: Iterable[Item]) -> None:
        """Call a function for its effect on this rank's memory: `share` tells the others."""
        listed = list(items)
        for _ in self.begin(function, [item for index, item in enumerate(listed) if self.mine(index)]):
            pass

    def share(self, index: int, tensor: Tensor) -> None:
        """Replace a tensor on all ranks by that of the rank of item `index`."""
        if self.size == 1:
            return
        if tensor.is_contiguous() and tensor.device.type == "cpu":
            self._group.broadcast(tensor, index % self.size)
        else:
            tensor.copy_(self._group.broadcast(tensor.cpu().contiguous(), index % self.size))

    def from_first(self, value: Result) -> Result:
        """The value of rank 0."""
        return self._given(value, 0)

    def of_all(self, value: Result) -> list[Result]:
        """The value of each rank, in their order."""
        return [self._given(value, rank) for rank in range(self.size)]

    def slices(self, count: int) -> list[slice]:
        """The part of `count` rows that each rank sums."""
        return [slice(count * rank // self.size, count * (rank + 1) // self.size) for rank in range(self.size)]

    def exchange(self, rows: Tensor, places: Sequence[Tensor], count: int) -> list[Tensor]:
        """Send each of this rank's rows to the rank that sums them; return the rows for this rank's slice, by sender.

        places: of each rank int64 [n], rising, where of `count` rows its own belong.
        """
        if self.size == 1:
            return [rows]
        ends = torch.tensor([part.stop for part in self.slices(count)])
        counts = []
        for place in places:
            before = torch.searchsorted(place, ends).tolist()
            counts.append([end - start for start, end in zip([0, *before[:-1]], before, strict=True)])
        send, receive = counts[self.rank], [sent[self.rank] for sent in counts]
        return list(self._group.all_to_all_rows(rows.contiguous(), send, receive).split(receive))

    def _given(self, value: Any, rank: int) -> Any:
        """The value of a rank, on all."""
        if self.size == 1:
            return value
        content = encoded(value) if rank == self.rank else torch.empty(0, dtype=torch.uint8)
        nbytes = int(self._group.broadcast(torch.tensor([content.numel()]), rank))
        if rank != self.rank:
            content = torch.empty(nbytes, dtype=torch.uint8)
        self._group.broadcast(content, rank)
        return value if rank == self.rank else decoded(content)
