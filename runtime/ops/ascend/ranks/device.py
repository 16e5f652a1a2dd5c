"""The NPU of a rank."""

from __future__ import annotations

from .....errors import RankError


def rank_device(local_rank: int, npus: int, asked: str | None = None) -> str:
    """Name the NPU of a rank: that of its place among the ranks of its machine.

    npus: of this machine, that this process sees. Raises RankError for another device that is asked for, which would be
    the same on all ranks, and for a place beyond the NPUs. Where the process sees none, the backend tells why.
    """
    device = f"npu:{local_rank}"
    if asked not in (None, "npu", device):
        raise RankError(f"rank {local_rank} of this machine runs on {device}, not on {asked}: leave the device out")
    if 0 < npus <= local_rank:
        seen = f"{npus} NPU{'' if npus == 1 else 's'}"
        raise RankError(
            f"rank {local_rank} of this machine needs {device}, and this process sees {seen}: start at most {npus} "
            "ranks a machine (--nproc-per-node), and let every rank see all NPUs (ASCEND_RT_VISIBLE_DEVICES)"
        )
    return device
