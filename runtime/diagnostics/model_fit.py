"""Fit of a model to the NPUs: its shapes and schemes to their operators, its bytes to their memory. Headers alone are
read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import BackendError, NpuqError

if TYPE_CHECKING:
    from ...formats.safetensors import TensorInfo
    from ...models.config import ModelConfig
    from ..memory.plan import Planner, RankPlan
    from ..memory.stored import StoredModel

DEVICE_BYTES: Final = 64_000_000_000
"""Memory of an Atlas A2's NPU, for machines without one."""


@dataclass(frozen=True)
class ModelFit:
    """Fit of a model directory to the supported families of NPUs. problems: the reasons why it cannot run.

    devices: the number of NPUs that it runs on, with `layout`; None where it does not run. device_bytes: the memory of
    one of them: this machine's smallest, or 64 GB on a machine without.
    """

    path: str
    runs: bool
    problems: tuple[str, ...]
    devices: int | None = None
    layout: str | None = None
    device_bytes: int = DEVICE_BYTES


def fit(directory: Path, memories: Sequence[int] = (), family: str | None = None) -> ModelFit:
    """Check a model against the NPU's operators, and against the memory of this machine's NPUs, in bytes, if any.

    family: read a checkpoint of unknown model_type as one of this family.
    """
    from ...formats.checkpoint import Checkpoint
    from ...formats.sources.model_config import read_model_config
    from ...formats.sources.opening import open_weights
    from ...formats.sources.ties import share_tied
    from ..memory.stored import stored_model

    memory = min(memories, default=DEVICE_BYTES)
    try:
        with Checkpoint.open(directory) as checkpoint:
            checkpoint.read_as(family)
            config = read_model_config(checkpoint)
            checks = [_attention_problem(config), _router_problem(config), *_expert_problems(checkpoint.tensors)]
            problems = [problem for problem in checks if problem is not None]
            if not problems:
                share_tied(checkpoint)
                model = stored_model(config, open_weights(checkpoint).weights)
                plan = _plan(model, memory, len(memories))
                return ModelFit(str(directory), True, (), plan.layout.ranks, str(plan.layout), memory)
    except NpuqError as error:
        problems = [str(error)]
    return ModelFit(str(directory), False, tuple(problems), device_bytes=memory)


def _plan(model: StoredModel, memory: int, devices: int) -> RankPlan:
    """The plan on one device if it fits, else on all; without any, on the fewest. BackendError where none fits."""
    from ..memory.plan import Planner
    from ..memory.weights import NpuMemory

    planner = Planner(model, NpuMemory(), memory)
    (alone,) = planner.layouts(1)
    if alone.fits:
        return alone
    if devices:
        return planner.choose(devices)
    return _fewest(planner, alone)


def _fewest(planner: Planner, alone: RankPlan) -> RankPlan:
    found = planner.fewest()
    if found is None:
        raise planner.refusal(alone)
    return found


def _attention_problem(config: ModelConfig) -> str | None:
    from ...models.gqa import Gqa
    from ...models.mla import Mla
    from ...models.sparse_mla import SparseMla
    from ..ops.ascend.attention.limits import check_gqa, check_indexer, check_mla

    widths = config.attention
    if isinstance(widths, Gqa):
        return message_of(check_gqa, "config.json", widths.heads, widths.kv_heads, widths.head_dim)
    if type(widths) not in (Mla, SparseMla):
        return f"config.json: the Ascend backend does not run the attention of {config.model_type}"
    problem = message_of(check_mla, "config.json", widths)
    if problem is None and isinstance(widths, SparseMla):
        sizes = (widths.indexer.n_heads, widths.indexer.head_dim, widths.indexer.topk)
        problem = message_of(check_indexer, "config.json", *sizes)
    return problem


def _router_problem(config: ModelConfig) -> str | None:
    from ..ops.ascend.routing import check_gating
    from ..weights import gating_of

    moe = config.moe
    return None if moe is None else message_of(check_gating, gating_of(moe), moe.has_router_bias)


def _expert_problems(tensors: Mapping[str, TensorInfo]) -> list[str | None]:
    """One entry for each input width of the W4A8 experts: layers share their shapes."""
    from ..ops.ascend.weights import check_w4a8_inputs

    quantized = [name.removesuffix(".scale_bias") for name in tensors if name.endswith(".scale_bias")]
    shapes = {name: tensors[f"{name}.weight"].shape for name in reversed(quantized) if f"{name}.weight" in tensors}
    if strange := [f"{name}.weight: is no matrix" for name, shape in shapes.items() if len(shape) != 2]:
        return list(strange)
    widths = {inputs: name for name, (_, inputs) in shapes.items()}
    return [message_of(check_w4a8_inputs, name, width) for width, name in widths.items()]


def message_of(check: Callable[..., object], *args: Any) -> str | None:
    """Message of the BackendError that a check raises for its arguments, or None."""
    try:
        check(*args)
    except BackendError as error:
        return str(error)
    return None
