"""Communicators of the exchange operators, by name: on the device a name stands for a group of HCCL, here for gloo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from ..emulate import RefusedError, require

DEFAULT_BUFFER = 200  # MB, without HCCL_BUFFSIZE


@dataclass
class Communicator:
    """buffer: MB, half for each direction. sent: arguments of the last dispatch, whose combine is still due."""

    group: Any
    rank: int
    size: int
    buffer: int
    sent: dict[str, Any] | None = None
    calls: int = 0
    fixed: dict[str, Any] = field(default_factory=dict)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank. A refusal of one is a refusal on all: none waits for another."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        for rank, each in enumerate(values):
            if isinstance(each, RefusedError):
                raise RefusedError(f"rank {rank}: {each}")
        return values


_open: dict[str, Communicator] = {}


def open_communicator(buffer: int = DEFAULT_BUFFER) -> str:
    """Make a group of all ranks for the exchange operators alone; its name."""
    group = dist.new_group(backend="gloo")
    name = f"hccl_{len(_open)}"
    _open[name] = Communicator(group, dist.get_rank(), dist.get_world_size(), buffer)
    return name


def close_all() -> None:
    _open.clear()


def communicator(name: str) -> Communicator:
    require(0 < len(name) < 128, f"group_ep {name!r} has {len(name)} characters")
    require(name in _open, f"group_ep {name!r} is no group of HCCL")
    return _open[name]
