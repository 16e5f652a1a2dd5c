"""Choice of a backend: by name, or the best of this machine."""

from __future__ import annotations

import torch

from ..choices import BACKENDS
from ..errors import BackendError
from ..inputs.printable import shown
from .ops import Ops
from .ops.ascend.ranks.device import rank_device
from .ops.ascend.support import npu_count
from .ranks.group import ALONE, Group


def make_ops(
    backend: str = "auto",
    dtype: torch.dtype | None = None,
    device: str | None = None,
    kv_layout: str = "nz",
    group: Group = ALONE,
    local_rank: int = 0,
) -> Ops:
    """The operators of a backend. `auto` is ascend where an NPU is there, else cpu.

    dtype: the compute dtype; None takes the backend's own (float32 on the CPU, bfloat16 on Ascend). device: which NPU,
    like "npu:0". kv_layout: layout of the KV cache's pages, "nz" or (on an NPU only) "nd". group: the ranks that share
    the model. local_rank: the place of this one among those of its machine, which is the number of its NPU. Raises
    BackendError for a backend that is unknown or not available here, and for a setting that the backend does not have,
    RankError for more ranks than NPUs.
    """
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is unknown; npuq has {', '.join(BACKENDS)}")
    if not isinstance(dtype, (torch.dtype, type(None))):
        raise BackendError(f"dtype must be a torch.dtype, not {shown(dtype)}")
    if backend == "auto":
        backend = "ascend" if npu_count() else "cpu"
    if backend == "ascend":
        from .ops.ascend.operators import AscendOps

        if group.size > 1:
            device = rank_device(local_rank, npu_count(), device)
        return AscendOps(device or "npu:0", dtype or torch.bfloat16, kv_layout, group=group)
    if device not in (None, "cpu"):
        raise BackendError(f"backend {backend} runs on the CPU, not on {device!r}")
    if kv_layout != "nz":
        raise BackendError(f"backend {backend} keeps its KV cache in the 'nz' layout, not in {kv_layout!r}")
    if backend == "reference":
        from .ops.reference import ReferenceOps

        return ReferenceOps(dtype or torch.float32, group)
    return _cpu_ops(dtype or torch.float32, group)


def _cpu_ops(dtype: torch.dtype, group: Group) -> Ops:
    """Native kernels where they are built and run on this CPU, else torch, with the same integers."""
    from ..native.binding import levels

    if dtype in (torch.float32, torch.bfloat16) and levels():
        from .ops.native import NativeOps

        return NativeOps(dtype, group=group)
    from .ops.cpu import CpuOps

    return CpuOps(dtype, group)
