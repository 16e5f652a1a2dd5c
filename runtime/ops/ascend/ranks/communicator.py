"""The communicator of the operators that communicate themselves: its HCCL name, and what fits its buffer."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .....errors import RankError
from ....ranks.group import Group
from .rules import DEFAULT_BUFFER, LIMITS, DispatchLimits, may_dispatch


@dataclass(frozen=True)
class Communicator:
    """A communicator for dispatch and combine alone. name: HCCL's. buffer: MB."""

    name: str
    limits: DispatchLimits
    buffer: int


def communicator_of(family: str, group: Group) -> Communicator | None:
    """Open the communicator of a group, on all its ranks at once; None where no step would dispatch.

    family: of the chips (`Soc.family`). Raises RankError for an HCCL_BUFFSIZE that is no number.
    """
    limits = LIMITS.get(family)
    if limits is None or not may_dispatch(limits, group.size):
        return None
    return Communicator(hccl_name(), limits, hccl_buffer())


def hccl_buffer() -> int:
    """Size of HCCL's buffers in MB: the operators that communicate divide them by HCCL_BUFFSIZE only.

    Raises RankError for a value that HCCL would not take.
    """
    text = os.environ.get("HCCL_BUFFSIZE", str(DEFAULT_BUFFER))
    if not (text.isascii() and text.isdecimal() and int(text[:9]) > 0):
        raise RankError(f"HCCL_BUFFSIZE {text[:40]!r} is no number of MB; leave it out, or set it to {DEFAULT_BUFFER}")
    return int(text[:9])


def hccl_name() -> str:
    """Make a process group of all ranks that nothing else uses, as these operators demand; its HCCL name."""
    import torch
    import torch.distributed as dist

    backend = dist.new_group(backend="hccl")._get_backend(torch.device("npu"))
    name: str = backend.get_hccl_comm_name(dist.get_rank())
    return name
