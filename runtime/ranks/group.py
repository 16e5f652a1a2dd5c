"""The group of ranks that run one model, and its collectives. Operators find it as `Ops.group`.

Collectives move values unchanged, or combine them exactly: maxima, and sums of integers. A sum of floats would depend
on the order of the ranks. All ranks must call the same collectives in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ...errors import RankError


class Group(Protocol):
    """Ranks 0 … size − 1, one process each. Tensors are on the device of the rank's operators, or on the CPU.

    A method that changes a tensor in place also returns it. Every method raises RankError when a rank is gone.
    """

    rank: int
    size: int

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        """Replace `tensor` by the elementwise maximum over the ranks, in place. A NaN of any rank may get lost."""

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        """Replace `tensor`, of integers, by the elementwise sum over the ranks, in place.

        Floats of which all ranks but one hold zeros are summed exactly as their bits: `rows.view(torch.int32)`.
        """

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Join the rows of all ranks in the order of the ranks: `[counts[rank], …]` → `[Σ counts, …]`.

        counts: the same on all ranks; zeros are allowed. Any dtype.
        """

    def all_to_all_rows(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        """Send the first `send_counts[0]` rows to rank 0, the next to rank 1, …; return what the ranks sent, in order.

        rows: `[Σ send_counts, …]` → `[Σ receive_counts, …]`; `receive_counts[r]` is what rank r sends here. Any dtype.
        """

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Replace `tensor` by that of rank `source`, in place. Shape and dtype are the same on all ranks."""

    def barrier(self) -> None:
        """Return when all ranks have called this."""

    def neighbours(self, size: int) -> Group:
        """The group of this rank and those beside it, where the ranks in order form groups of `size`.

        All ranks of this group call it. size divides their number.
        """


class Alone:
    """The group of one process: every collective returns its argument."""

    rank = 0
    size = 1

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return rows

    def all_to_all_rows(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        return rows

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        return tensor

    def barrier(self) -> None:
        return

    def neighbours(self, size: int) -> Group:
        return self


ALONE: Final[Group] = Alone()


class Distributed:
    """A process group of torch.distributed: gloo for tensors on the CPU, hccl for those on NPUs.

    process_group: of `torch.distributed`; None is the default group, which must have been initialized. why: says, when
    a collective has failed, which rank is gone; None where it does not know.
    """

    def __init__(self, process_group: Any = None, why: Callable[[], str | None] = lambda: None):
        import torch.distributed as dist

        self._dist, self._group, self._why = dist, process_group, why
        self._neighbours: dict[int, Group] = {}
        self.rank: int = dist.get_rank(process_group)
        self.size: int = dist.get_world_size(process_group)

    def all_reduce_max(self, tensor: Tensor) -> Tensor:
        self._call("all_reduce", tensor, self._dist.ReduceOp.MAX)
        return tensor

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        self._call("all_reduce", tensor, self._dist.ReduceOp.SUM)
        return tensor

    def all_gather_rows(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        _check_counts(rows, counts[self.rank])
        # Gloo gathers equal counts only. This moves as many bytes as a gather, without padding.
        copies = rows.expand(self.size, *rows.shape).flatten(0, 1)
        return self._exchange(copies, [counts[self.rank]] * self.size, counts)

    def all_to_all_rows(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        _check_counts(rows, sum(send_counts))
        return self._exchange(rows, send_counts, receive_counts)

    def broadcast(self, tensor: Tensor, source: int = 0) -> Tensor:
        self._call("broadcast", tensor, group_src=source)
        return tensor

    def barrier(self) -> None:
        self._call("barrier")

    def neighbours(self, size: int) -> Group:
        if size == self.size:
            return self
        if size not in self._neighbours:
            self._neighbours[size] = ALONE if size == 1 else self._of_neighbours(size)
        return self._neighbours[size]

    def _of_neighbours(self, size: int) -> Group:
        # Every rank makes all the groups, in one order.
        whole: Any = self._group or self._dist.group.WORLD
        ranks = [self._dist.get_global_rank(whole, rank) for rank in range(self.size)]
        made = [self._dist.new_group(ranks[first : first + size]) for first in range(0, self.size, size)]
        return Distributed(made[self.rank // size], self._why)

    def _exchange(self, rows: Tensor, send_counts: Sequence[int], receive_counts: Sequence[int]) -> Tensor:
        received = rows.new_empty(sum(receive_counts), *rows.shape[1:])
        sent = _as_bytes(rows.contiguous())
        self._call("all_to_all_single", _as_bytes(received), sent, list(receive_counts), list(send_counts))
        return received

    def _call(self, name: str, *arguments: Any, **options: Any) -> None:
        try:
            getattr(self._dist, name)(*arguments, group=self._group, **options)
        except RuntimeError as error:
            message = f"rank {self.rank} of {self.size}: {name} has failed; another rank is gone"
            raise RankError(self._why() or message) from error


def _as_bytes(rows: Tensor) -> Tensor:
    """View contiguous rows as bytes `[rows, bytes of a row]`: a collective knows few dtypes, and moves all the same."""
    # Flat first: of a tensor with one column torch calls any stride contiguous.
    return rows.flatten().view(torch.uint8).view(rows.shape[0], prod(rows.shape[1:]) * rows.element_size())


def _check_counts(rows: Tensor, count: int) -> None:
    if rows.shape[0] != count:
        raise ValueError(f"{rows.shape[0]} rows to send, and counts of {count}")
