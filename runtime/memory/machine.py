"""The memory that this machine has for a rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch

from ...errors import BackendError, NpuqError
from ...inputs.files import read_text
from ...models.config import ModelConfig
from ..engine import EngineConfig
from ..ops import Ops
from .plan import Planner, RankPlan
from .stored import Stored, model_of_forms
from .weights import Backend, CpuMemory, NpuMemory
from .workspace import StepSizes

PROCESS_BYTES: Final = 300 << 20
"""Python, torch and its libraries, in a process on the CPU."""
_CGROUPS: Final = Path("/sys/fs/cgroup")
_MOST_LIMIT_BYTES: Final = 64


def planner_of(
    form: Callable[[str], Stored], config: ModelConfig, ops: Ops, engine: EngineConfig, memory: int, *, int8_cache: bool
) -> Planner:
    """The planner of a model that is about to be loaded.

    form: how its tensors are stored, by name. memory: of a rank, as of `rank_memory`.
    """
    sizes = StepSizes(
        engine.max_num_batched_tokens, engine.prefix_segment_tokens, engine.max_num_seqs, engine.block_size
    )
    return Planner(model_of_forms(config, form), backend_memory(ops), memory, sizes, int8_cache)


def engine_cache(plan: RankPlan, engine: EngineConfig) -> int:
    """Bytes of a rank's cache in an engine: what `kv_cache_bytes` allows, at most what all its sequences can fill."""
    block = plan.cache_token * engine.block_size
    most = engine.max_num_seqs * -(-plan.context // engine.block_size)
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
