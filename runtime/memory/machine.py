"""The memory that this machine has for a rank."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from ...errors import BackendError, NpuqError
from ...inputs.files import read_text
from ...models.config import ModelConfig
from ..engine_config import EngineConfig
from ..ops import Ops
from .plan import Planner, RankPlan
from .stored import Stored, model_of_forms
from .weights import Backend, CpuMemory, NpuMemory
from .workspace import StepSizes

PROCESS_BYTES: Final = 300 << 20
"""Python, torch and its libraries, in a process on the CPU."""
NPU_RESERVE: Final = 0.05
"""The share of an NPU's memory that a cache of automatic size leaves free, for what CANN and HCCL allocate later."""
_MEMINFO: Final = Path("/proc/meminfo")
_MOST_MEMINFO_BYTES: Final = 1 << 16
_CGROUPS: Final = Path("/sys/fs/cgroup")
_MOST_LIMIT_BYTES: Final = 64


def planner_of(
    form: Callable[[str], Stored], config: ModelConfig, ops: Ops, engine: EngineConfig, memory: int, *, int8_cache: bool
) -> Planner:
    """The planner of a model that is about to be loaded.

    form: how its tensors are stored, by name. memory: of a rank, as of `rank_memory`.
    """
    sizes = StepSizes(
        engine.max_num_batched_tokens, engine.prefix_segment_tokens, engine.max_num_seqs, engine.block_tokens
    )
    return Planner(model_of_forms(config, form), backend_memory(ops), memory, sizes, int8_cache)


def engine_cache(planner: Planner, plan: RankPlan, engine: EngineConfig, free: int | None = None) -> int:
    """Bytes of a rank's cache in an engine: what `kv_cache_bytes` allows, at most what all its sequences can fill.

    free: as of `free_memory`, for a cache of automatic size.
    """
    if engine.kv_cache_bytes is None:
        return planner.auto_cache(plan, free)
    block = plan.cache_token * engine.block_tokens
    most = engine.max_num_seqs * -(-plan.context // engine.block_tokens)
    return min(engine.kv_cache_bytes // block, most) * block


def backend_memory(ops: Ops) -> Backend:
    """How a backend's weights lie in memory."""
    return NpuMemory(ops.dtype) if ops.name == "ascend" else CpuMemory(ops.dtype)


def rank_memory(ops: Ops, ranks_here: int) -> int:
    """Bytes of memory of one of `ranks_here` ranks of this machine: of its NPU, or its share of the RAM.

    On an NPU, what other processes hold is left out.
    """
    if ops.device.type == "npu":
        free, total = getattr(torch, "npu").mem_get_info(ops.device)  # noqa: B009  # torch_npu puts it there
        return min(int(total), int(free / NpuMemory.usable))
    return max(0, ram() // ranks_here - PROCESS_BYTES)


def free_memory(ops: Ops, ranks_here: int) -> int:
    """Bytes that one of `ranks_here` ranks of this machine may still take, with a reserve left free.

    The reserve is `NPU_RESERVE` on an NPU, and `PROCESS_BYTES` of a rank on the CPU. Pages of files count as free RAM.
    """
    if ops.device.type == "npu":
        free, total = getattr(torch, "npu").mem_get_info(ops.device)  # noqa: B009  # torch_npu puts it there
        return max(0, int(free - NPU_RESERVE * total))
    return max(0, min(ram(), _available_ram()) // ranks_here - PROCESS_BYTES)


def _available_ram() -> int:
    """Bytes of RAM that no process holds, as Linux estimates them; elsewhere all of it."""
    try:
        text = read_text(_MEMINFO, BackendError, _MOST_MEMINFO_BYTES)
    except NpuqError:
        return ram()
    found = re.search(r"^MemAvailable: *([0-9]{1,15}) kB$", text, re.MULTILINE)
    return ram() if found is None else int(found[1]) << 10


def ram() -> int:
    """Bytes of RAM that this process may use: the machine's, or the limit of its container."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *_limits()])


def _limits() -> Iterator[int]:
    """The limits of control groups, in version 2 and 1 of their files, as a container sees its own."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = read_text(_CGROUPS / name, BackendError, _MOST_LIMIT_BYTES).strip()
        except NpuqError:
            continue
        if text.isascii() and text.isdecimal():  # else "max"
            yield int(text)
