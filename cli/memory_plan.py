"""`npuq doctor --plan MODEL`: the layouts of a model on several devices, from headers alone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..units import format_bytes
from .terminal.console import show

if TYPE_CHECKING:
    from ..formats.checkpoint import Checkpoint
    from ..verification.memory_plan import MemoryPlan, PlanLine

_DEVICES, _MEMORY = 8, 64_000_000_000


def plan_of(model: Path, family: str | None, recipe: str, devices: int | None, memory: int | None) -> MemoryPlan:
    """Plan a model: a directory, `user/repo`, whose headers alone are fetched, or a config.json by itself.

    devices, memory: None are this machine's NPUs, and on a machine without any, 8 of 64 GB.
    """
    from ..models.config import ModelConfig
    from ..recipes.reading import load_recipe
    from ..runtime.memory.machine import ram
    from ..verification.memory_plan import plan_memory, read_stored, stored_by_recipe

    wanted = load_recipe(recipe)
    if model.is_file():
        from ..errors import CheckpointError
        from ..inputs.json_text import read_object

        config = ModelConfig.from_dict(read_object(model, CheckpointError))
        stored = stored_by_recipe(config, wanted)
    else:
        with _opened(model) as checkpoint:
            checkpoint.read_as(family)
            stored = read_stored(checkpoint, wanted)
    found_devices, found_memory = _npus()
    return plan_memory(*stored, devices or found_devices, memory or found_memory, ram())


@contextmanager
def _opened(model: Path) -> Iterator[Checkpoint]:
    from ..formats.checkpoint import Checkpoint
    from ..hub.locate import repo_and_revision

    named = repo_and_revision(model)
    if named is None:
        with Checkpoint.open(model) as checkpoint:
            yield checkpoint
        return
    from ..hub import open_remote
    from .transfer import silence_client

    silence_client()
    repo, revision = named
    with tempfile.TemporaryDirectory(prefix="npuq-") as folder, open_remote(repo, folder, revision=revision) as found:
        yield found


def _npus() -> tuple[int, int]:
    """The number of this machine's NPUs, and the bytes of the smallest."""
    from ..runtime.diagnostics.doctor import npu_memories

    memories = npu_memories()
    return (len(memories), min(memories)) if memories else (_DEVICES, _MEMORY)


def print_plan(plan: MemoryPlan) -> None:
    """Print the table of layouts, and what follows from it."""
    from ..verification.memory_plan import ASSUMPTIONS

    size = format_bytes(plan.memory)
    show(f"{plan.model_type}, {plan.stored}, on {plan.devices} devices of {size}; bytes of a device:")
    show(f"{'server':12} {'layout':12} {'weights':>9} {'step':>9} {'cache/token':>12} {'cache tokens':>13}  fits")
    for line in plan.lines:
        show(_row(line, plan.recommended))
    for line in plan.lines:
        if line.problem:
            show(f"{line.server} {line.layout}: {line.problem}")
    show(*_conclusions(plan))
    show("Assumed:", *(f"  {line}" for text in ASSUMPTIONS for line in text.splitlines()))


def _row(line: PlanLine, recommended: str | None) -> str:
    held = line.plan
    if held is None:
        return f"{line.server:12} {line.layout:12} {'–':>9} {'–':>9} {'–':>12} {'–':>13}  no"
    mark = " ← recommended" if line.server == "npuq" and line.layout == recommended else ""
    return (
        f"{line.server:12} {line.layout:12} {format_bytes(held.total_weights.total):>9} "
        f"{format_bytes(held.workspace.fixed):>9} {format_bytes(held.cache_token):>12} {line.cache_tokens:>13,}  "
        f"{'yes' if line.fits else 'no'}{mark}"
    )


def _conclusions(plan: MemoryPlan) -> Iterator[str]:
    if plan.recommended is not None and plan.devices > 1:
        yield f"Run it: torchrun --nproc-per-node {plan.devices} -m npuq generate … --parallel {plan.recommended}"
    if plan.auto_cache is not None:
        tokens, held = plan.auto_cache
        yield f"Cache that npuq takes there (--cache-size auto): {format_bytes(held)} a device, {tokens:,} tokens."
    if plan.fewest is not None:
        ranks, tokens = plan.fewest.layout.ranks, plan.fewest.cache_tokens
        layout = f" ({plan.fewest.layout})" if ranks > 1 else ""
        yield f"Fewest such devices for npuq: {ranks}{layout}, with {tokens:,} tokens of cache."
    else:
        yield "No number of such devices holds it in npuq."
    if plan.cpu is not None and plan.ram is not None:
        mapped, ram = plan.cpu.total_weights.mapped, plan.ram
        slow = "" if mapped < ram else ": too little to keep all of them, so that steps wait for the disk"
        yield f"This machine's CPU: {format_bytes(mapped)} of weights in their files, {format_bytes(ram)} of RAM{slow}."
