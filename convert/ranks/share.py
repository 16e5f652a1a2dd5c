"""The share of a rank: the shards that it writes. It follows from the plan and the number of ranks alone."""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from typing import Final

from ...errors import ConversionError
from ...inputs.launch import MAX_RANKS
from ...inputs.printable import shown
from ..plan.plan import Plan
from ..tally import data_free_effort

_SHARE: Final = re.compile(r"([0-9]{1,5})/([0-9]{1,5})")


@dataclass(frozen=True)
class Share:
    """The share of rank `rank` (from 0) of `size`."""

    rank: int = 0
    size: int = 1

    @classmethod
    def parse(cls, text: str) -> Share:
        """Parse `2/8`, rank 2 of 8. Raises ConversionError."""
        match = _SHARE.fullmatch(text)
        if match is None or not int(match[1]) < int(match[2]) <= MAX_RANKS:
            raise ConversionError(
                f"--shard-of {shown(text)}: write it as I/N, with I from 0 to N − 1 and N up to {MAX_RANKS}: "
                "0/4 to 3/4 for four jobs"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size}"

    def shards(self, plan: Plan) -> list[int]:
        """The numbers of the rank's shards, rising: the costliest shard first, each to the rank with the least work."""
        costs = [sum(data_free_effort(plan.jobs[index]) for index in shard.jobs) for shard in plan.shards]
        loads = [(0.0, rank) for rank in range(self.size)]  # a heap
        mine = []
        for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + costs[number], rank))
            if rank == self.rank:
                mine.append(number)
        return sorted(mine)
