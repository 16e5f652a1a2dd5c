"""A pool over ranks: each rank computes its part of the items on its own threads, and all get the results in order.

All ranks call the same methods with equal arguments, from one thread. Results are moved, and never combined: what is
summed is summed in one order, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from ....parallel.pool import Pool
from ....runtime.ranks.group import Group
from .values import decoded, encoded

_NOTHING: Final = torch.empty(0, dtype=torch.uint8)
_FIRST_BYTES: Final = 1024
_LENGTH_BYTES: Final = 8
_COPIES_BYTES: Final = 64 << 20
"""Of a tensor that some ranks read: as many get it at once, or one, for the sender has a copy for each."""

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

    def map(
        self, function: Callable[[Item], Result], items: Iterable[Item], readers: int | None = None
    ) -> Iterator[Result]:
        """Yield the results in the order of `items`.

        readers: so many ranks, from rank 0 on, get the values of large tensors; the others get tensors on the device
        "meta", which have none. None: all ranks.
        """
        listed = list(items)
        own = self.begin(function, [item for index, item in enumerate(listed) if self.mine(index)])
        for index in range(len(listed)):
            yield self._given(next(own) if self.mine(index) else None, index % self.size, readers)

    def gathered(self, function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """The results in the order of `items`, all sent at once: small ones."""
        listed = list(items)
        own = list(self.begin(function, [item for index, item in enumerate(listed) if self.mine(index)]))
        found = self.of_all(own)
        return [found[index % self.size][index // self.size] for index in range(len(listed))]

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
        if self.size == 1 or not tensor.numel():
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
        if self.size == 1:
            return [value]
        head, large = encoded(value)
        lengths = self._group.all_gather_rows(torch.tensor([head.numel()]), [1] * self.size).tolist()
        heads = self._group.all_gather_rows(head, lengths).split(lengths)
        return [self._received(value, large, heads[rank], rank) for rank in range(self.size)]

    def exchange(self, rows: Tensor, places: Sequence[Tensor], ends: Sequence[int]) -> list[Tensor]:
        """Send each of this rank's rows to the rank that sums them; return the rows that this rank sums, by sender.

        places: of each rank int64 [n], rising, where its own rows belong. ends: each rank sums the places from the end
        of the rank before it to its own.
        """
        if self.size == 1:
            return [rows]
        counts = []
        for place in places:
            before = torch.searchsorted(place, torch.tensor(ends)).tolist()
            counts.append([end - start for start, end in zip([0, *before[:-1]], before, strict=True)])
        send, receive = counts[self.rank], [sent[self.rank] for sent in counts]
        return list(self._group.all_to_all_rows(rows.contiguous(), send, receive).split(receive))

    def _given(self, value: Any, rank: int, readers: int | None = None) -> Any:
        """The value of a rank, on all."""
        if self.size == 1:
            return value
        head, large = encoded(value) if rank == self.rank else (_NOTHING, [])
        # One message is enough for most values.
        first = torch.zeros(_FIRST_BYTES, dtype=torch.uint8)
        first[:_LENGTH_BYTES].view(torch.int64).fill_(head.numel())
        first[_LENGTH_BYTES:][: head.numel()] = head[: _FIRST_BYTES - _LENGTH_BYTES]
        self._group.broadcast(first, rank)
        length = int(first[:_LENGTH_BYTES].view(torch.int64))
        rest = length - (_FIRST_BYTES - _LENGTH_BYTES)
        if rest > 0:
            more = head[-rest:] if rank == self.rank else torch.empty(rest, dtype=torch.uint8)
            head = torch.cat([first[_LENGTH_BYTES:], self._group.broadcast(more, rank)])
        else:
            head = first[_LENGTH_BYTES:][:length]
        return self._received(value, large, head, rank, readers)

    def _received(
        self, value: Any, large: Sequence[Tensor], head: Tensor, rank: int, readers: int | None = None
    ) -> Any:
        """The value of a rank whose `head` has come; `large`: of this rank's own `value`, to be sent."""
        if rank == self.rank:
            for tensor in large:
                self._deliver(tensor, rank, readers)
            return value

        def receive(dtype: torch.dtype, shape: list[int]) -> Tensor:
            reads = readers is None or self.rank < readers
            return self._deliver(torch.empty(shape, dtype=dtype, device="cpu" if reads else "meta"), rank, readers)

        return decoded(head, receive)

    def _deliver(self, tensor: Tensor, rank: int, readers: int | None) -> Tensor:
        """Replace a tensor by that of a rank, on the ranks that read it."""
        if readers is None or readers >= self.size:
            self._group.broadcast(tensor.view(-1).view(torch.uint8), rank)
            return tensor
        takers, nbytes = [reader for reader in range(readers) if reader != rank], tensor.nbytes
        at_once = max(1, _COPIES_BYTES // max(1, nbytes))
        for start in range(0, len(takers), at_once):
            some = takers[start : start + at_once]
            sent, counts, taken = torch.empty(0, dtype=torch.uint8), [0] * self.size, [0] * self.size
            if rank == self.rank:
                sent = tensor.view(-1).view(torch.uint8).expand(len(some), -1).flatten()
                counts = [nbytes if reader in some else 0 for reader in range(self.size)]
            elif self.rank in some:
                taken[rank] = nbytes
            found = self._group.all_to_all_rows(sent, counts, taken)
            if self.rank in some:
                tensor = found.view(tensor.dtype).view(tensor.shape)
        return tensor
