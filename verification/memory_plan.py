"""The memory of a model on several devices: the layouts of npuq's runtime, and those of the engines for the artifact.

Nothing is loaded: headers say how tensors are stored, and a recipe how they would be. In the engines' layouts each of
`dp` groups of `tp` devices has its own requests and its own cache; experts are spread over all devices (`ep`), or each
of them is sliced. What a device then holds is what a rank of npuq's layout with the same `ep` and `tp` holds
(vllm-ascend 182b75e: `attention/mla_v1.py`, `quantization/methods/w4a8.py`): both keep W_UK and W_UV beside kv_b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from ..engines.placement import ENGINES, Placement, broken_requirements
from ..errors import BackendError
from ..formats.checkpoint import Checkpoint
from ..formats.schemes import Scheme
from ..formats.sources.model_config import read_model_config
from ..formats.sources.opening import open_weights
from ..formats.sources.ties import share_tied
from ..models.config import ModelConfig
from ..models.family import Block
from ..models.inventory import take_inventory
from ..recipes.recipe import Recipe
from ..runtime.attention.kinds import is_on_reference_alone
from ..runtime.memory.machine import PROCESS_BYTES
from ..runtime.memory.plan import Planner, RankPlan, recommended
from ..runtime.memory.stored import Part, StoredModel, model_of_schemes, stored_model
from ..runtime.memory.weights import Bytes, CpuMemory, NpuMemory, bytes_by_kind, sliced_bytes
from ..runtime.ranks.layout import Layout, Owned, fits

RUNTIME: Final = "npuq"
_OFFSET_BYTES = 4


@dataclass(frozen=True)
class PlanLine:
    """One layout of one server. problem: why it cannot be, and then there are no numbers.

    plan: of the device that needs most memory. groups: parts of the server with requests and a cache of their own.
    """

    server: str
    layout: str
    options: str
    plan: RankPlan | None
    groups: int = 1
    problem: str | None = None

    @property
    def cache_tokens(self) -> int:
        """Tokens in the caches of all groups."""
        return 0 if self.plan is None else self.groups * self.plan.cache_tokens

    @property
    def fits(self) -> bool:
        return self.plan is not None and self.plan.fits

    def as_dict(self) -> dict[str, Any]:
        numbers = {} if self.plan is None else self.plan.as_dict()
        own = {"server": self.server, "layout": self.layout, "options": self.options, "groups": self.groups}
        return {**own, **numbers, "cache_tokens": self.cache_tokens, "fits": self.fits, "problem": self.problem}


@dataclass(frozen=True)
class MemoryPlan:
    """Layouts of a model on `devices` devices of `memory` bytes.

    stored: in words, what the numbers are for. recommended: npuq's layout that it would choose; None where none fits.
    auto_cache: tokens and bytes of the cache that npuq takes there where no size is given. fewest: npuq's layout on the
    fewest such devices that leaves a useful cache; None where no number does. cpu: npuq's plan in one process on the
    CPU of a machine with `ram` bytes; None where that is unknown.
    """

    model_type: str
    stored: str
    devices: int
    memory: int
    lines: tuple[PlanLine, ...]
    recommended: str | None
    auto_cache: tuple[int, int] | None
    fewest: RankPlan | None
    cpu: RankPlan | None
    ram: int | None

    def as_dict(self) -> dict[str, Any]:
        """Fields as values for JSON."""
        return {
            "model_type": self.model_type,
            "stored": self.stored,
            "devices": self.devices,
            "memory_bytes": self.memory,
            "recommended": self.recommended,
            "auto_cache": dict(zip(("tokens", "bytes"), self.auto_cache, strict=True)) if self.auto_cache else None,
            "fewest": None if self.fewest is None else self.fewest.as_dict(),
            "cpu": None if self.cpu is None else self.cpu.as_dict(),
            "ram_bytes": self.ram,
            "layouts": [line.as_dict() for line in self.lines],
        }


def read_stored(checkpoint: Checkpoint, recipe: Recipe) -> tuple[StoredModel, str]:
    """How an artifact is stored, or a float checkpoint would be by `recipe`; and which of the two, in words.

    Raises CheckpointError, ArtifactError and UnknownModelError as opening a checkpoint does.
    """
    config = read_model_config(checkpoint)
    share_tied(checkpoint)
    source = open_weights(checkpoint)
    if source.is_quantized:
        return stored_model(config, source.weights), "as it is stored"
    take_inventory(config, source.weights)
    return stored_by_recipe(config, recipe)


def stored_by_recipe(config: ModelConfig, recipe: Recipe) -> tuple[StoredModel, str]:
    """How the artifact of a model would be stored, from its config alone."""
    layers = config.num_hidden_layers
    model = model_of_schemes(config, lambda spec: recipe.scheme_of(spec, layers))
    return model, f"as converted by recipe {recipe.name}"


def plan_memory(model: StoredModel, stored: str, devices: int, memory: int, ram: int | None = None) -> MemoryPlan:
    """Plan every layout of a model on `devices` devices of `memory` bytes.

    Raises BackendError for a model that npuq does not run on devices.
    """
    if is_on_reference_alone(model.config):
        raise BackendError(
            f"{model.config.model_type} has no memory plan: npuq runs it on the CPU alone, and does not know the "
            "caches that engines give it"
        )
    planner = Planner(model, NpuMemory(), memory)
    own = planner.layouts(devices)
    lines = [PlanLine(RUNTIME, str(plan.layout), f"--parallel {plan.layout}", plan) for plan in own]
    for engine in ENGINES:
        lines += _engine_lines(engine, planner, devices)
    best = recommended(own) if own else None
    fitting = best if best is not None and best.fits else None
    cache = None if fitting is None else planner.auto_cache(fitting)
    return MemoryPlan(
        model_type=model.config.model_type,
        stored=stored,
        devices=devices,
        memory=memory,
        lines=tuple(lines),
        recommended=None if fitting is None else str(fitting.layout),
        auto_cache=None if fitting is None or cache is None else (cache // fitting.cache_token, cache),
        fewest=planner.fewest(),
        cpu=None if ram is None else Planner(model, CpuMemory(), max(0, ram - PROCESS_BYTES)).rank(Layout()),
        ram=ram,
    )


class EngineMemory(NpuMemory):
    """Memory of weights in vLLM-Ascend and SGLang: npuq's, and the offsets of codes, which are zeros but are kept."""

    def weight(self, part: Part, outputs: int, inputs: int, by_columns: bool) -> Bytes:
        held = super().weight(part, outputs, inputs, by_columns)
        quantized = part.stored.scheme is not Scheme.FLOAT
        return held.plus(Bytes(copied=_OFFSET_BYTES * outputs)) if quantized else held


def _engine_lines(engine: str, planner: Planner, devices: int) -> Iterator[PlanLine]:
    """The layouts of an engine: with whole experts for each number of groups, and with sliced experts in one group."""
    config = planner.model.config
    for groups in [number for number in range(1, devices + 1) if devices % number == 0]:
        tp, ep = devices // groups, devices > 1
        if ep and config.moe is None:
            continue
        if groups == 1 and ep:
            yield _engine_line(engine, planner, 1, devices, False)
        yield _engine_line(engine, planner, groups, tp, ep)


def _engine_line(engine: str, planner: Planner, groups: int, tp: int, ep: bool) -> PlanLine:
    config, devices = planner.model.config, groups * tp
    name = ",".join([*([f"dp={groups}"] if groups > 1 else []), f"tp={tp}", *(["ep"] if ep else [])])
    line = PlanLine(engine, name, _OPTIONS[engine](groups, tp, ep), None, groups)
    placement = Placement(config, planner.model.expert_scheme, tp, ep)
    problem = next(broken_requirements(engine, placement), None)
    if problem is None and ep and config.n_routed_experts % devices:
        problem = f"{config.n_routed_experts} routed experts cannot be spread over {devices} devices"
    if problem is not None:
        return replace(line, problem=problem)
    layout = Layout(devices, devices if ep else 1, tp)
    if not fits(layout, config):
        return replace(line, problem=f"npuq does not divide this {config.model_type} so")
    return replace(line, plan=_engine_plan(planner, layout, ep))


def _engine_plan(planner: Planner, layout: Layout, ep: bool) -> RankPlan:
    plan = replace(planner, backend=EngineMemory()).rank(layout)
    if ep or layout.ranks == 1:
        return plan
    owned = layout.owned(planner.model.config, 0)
    return replace(plan, weights=_sliced_experts(planner.model, owned))


def _sliced_experts(model: StoredModel, owned: Owned) -> Mapping[str, Bytes]:
    """Bytes of weights where each device has a slice of every expert: columns of gate and up, inputs of down."""
    backend = EngineMemory()

    def of_part(part: Part) -> Bytes:
        if part.block is not Block.EXPERT:
            ranges = owned.ranges(part.block, part.entry, exact_sum=True, shape=part.shape)
            return sliced_bytes(part, ranges, backend).times(part.count)
        inner = 1 if part.entry.row_parallel else 0
        sliced = [owned.tiles(size) if axis == inner else range(size) for axis, size in enumerate(part.shape)]
        return sliced_bytes(part, sliced, backend).times(part.count)

    return bytes_by_kind(model, backend, of_part)


def _vllm_options(groups: int, tp: int, ep: bool) -> str:
    words = [f"--tensor-parallel-size {tp}"]
    if groups > 1:
        words.append(f"--data-parallel-size {groups}")
    return " ".join([*words, *(["--enable-expert-parallel"] if ep else [])])


def _sglang_options(groups: int, tp: int, ep: bool) -> str:
    devices = groups * tp
    words = [f"--tp-size {devices}", *([f"--ep-size {devices}"] if ep else [])]
    return " ".join([*words, *([f"--enable-dp-attention --dp-size {groups}"] if groups > 1 else [])])


_OPTIONS: Final = {"vllm-ascend": _vllm_options, "sglang": _sglang_options}

ASSUMPTIONS: Final = (
    "A device may be filled to 90 %: the rest is for CANN, HCCL's buffers and fragmentation.",
    "Steps of 1,024 tokens of up to 32 sequences, the cache in bfloat16, no draft model.",
    "Engines: dp groups have requests and caches of their own; cache tokens are those of all groups together.",
    "Engines: their graphs and buffers are not counted, nor steps of other sizes. With dp, SGLang spreads MLPs and\n"
    "head over all devices, and keeps the embedding whole.",
)
"""What the numbers assume, for people."""
