"""Requirements of engines on the ranks that a model is spread over, as data: can it be spread, and does it compute
rightly?

The requirements of an engine are those of the releases that ENGINES names with it. They were found by running the
engines' own loading code on artifacts, rank by rank, with emulated NPU operators (tests/engines), and change when the
engines do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ArtifactError
from ..formats.artifact import DESCRIPTION_NAME, read_description, read_description_keys
from ..formats.checkpoint import config_as, read_config
from ..formats.schemes import BIAS_COLUMNS, Scheme
from ..models.config import ModelConfig
from ..models.family import Block
from ..models.tensors import Spec
from .parameters import (
    clamp_notes,
    dense_notes,
    draft_notes,
    indexer_notes,
    key_problems,
    parameter_problems,
    refused_names,
    variable_notes,
)
from .requirements import sparse_layers

# The NPU's W4A8 grouped matmul takes multiples of so many input features (CANN's tiling of aclnnGroupedMatmul).
_W4A8_INPUTS = 64


@dataclass(frozen=True)
class Placement:
    """A model on `tp` ranks. With `ep` each rank has whole routed experts, else a slice of every one."""

    config: ModelConfig
    experts: Scheme | None  # W4A8 where any layer of the main model has W4A8 experts; None without experts
    tp: int
    ep: bool

    @property
    def dense_width(self) -> int:
        """Channels of a dense layer's MLP; 0 in a model without such a layer."""
        layers = range(self.config.num_hidden_layers)
        return self.config.intermediate_size if None in map(self.config.moe_at, layers) else 0

    @property
    def shared_width(self) -> int:
        """Channels of the shared experts, which every layer has as one MLP; 0 without."""
        return 0 if self.config.moe is None else self.config.moe.shared_intermediate_size

    @property
    def expert_width(self) -> int:
        """Channels of a routed expert; 0 without."""
        return 0 if self.config.moe is None else self.config.moe.moe_intermediate_size

    @property
    def selects(self) -> bool:
        """True for sparse attention. Each rank then has the whole indexer, and a share of the attention's heads."""
        return self.config.attention.dense_tokens is not None

    @property
    def is_latent(self) -> bool:
        """True for latent attention, whose rotary tables engines make as DeepSeek's model does."""
        return self.config.attention.rotary_temperature

    @property
    def rank_heads(self) -> int:
        """Attention heads of a rank."""
        return self.config.attention.heads // self.tp

    @property
    def slices_w4a8(self) -> bool:
        """True where each rank has a slice of every W4A8 expert."""
        return self.experts is Scheme.W4A8 and self.tp > 1 and not self.ep


def _is_power_of_two(heads: int) -> bool:
    return 0 < heads <= 128 and heads & (heads - 1) == 0


@dataclass(frozen=True)
class Requirement:
    """A requirement on placements: `broken` is True for one that breaks it; `why` is the reason and the remedy in a
    line, with fields for the placement's numbers."""

    broken: Callable[[Placement], bool]
    why: str


@dataclass(frozen=True)
class Engine:
    """The releases of an engine that were tested, oldest first, and what all of them require of a placement."""

    releases: tuple[str, ...]
    requirements: tuple[Requirement, ...]


_COMMON = (
    Requirement(
        lambda p: p.is_latent and p.config.rope.rope_type not in ("default", "yarn"),
        "rope type {rope} is computed as YaRN, whatever config.json says: no deployment of it is right",
    ),
    Requirement(
        lambda p: p.is_latent and (p.config.rope.attention_factor is not None or not p.config.rope.truncate),
        "attention_factor and truncate of YaRN are not read: write mscale and mscale_all_dim instead",
    ),
    Requirement(
        lambda p: p.config.attention.heads % p.tp != 0,
        "{heads} attention heads cannot be shared by {tp} ranks: choose a --tp that divides {heads}",
    ),
    Requirement(
        lambda p: p.config.attention.kv_heads % p.tp != 0 and p.tp % p.config.attention.kv_heads != 0,
        "{kv_heads} key and value heads can neither be shared by {tp} ranks nor repeated evenly: choose a --tp that "
        "divides {kv_heads}, or a multiple of it",
    ),
    Requirement(
        lambda p: p.selects and p.config.attention.heads % p.tp == 0 and not _is_power_of_two(p.rank_heads),
        "each of {tp} ranks would have {rank_heads} attention heads, and npu_sparse_flash_attention takes 1, 2, 4, … "
        "or 128: choose another --tp",
    ),
    Requirement(
        lambda p: p.dense_width % p.tp != 0 or p.shared_width % p.tp != 0,
        "the {dense} channels of dense MLPs and the {shared} of shared experts cannot be shared by {tp} ranks: choose "
        "a --tp that divides both",
    ),
    Requirement(
        lambda p: p.ep and p.config.n_routed_experts % p.tp != 0,
        "{experts} routed experts cannot be spread over {tp} ranks: choose a --tp that divides {experts}",
    ),
    Requirement(
        lambda p: p.slices_w4a8 and p.expert_width % (p.tp * _W4A8_INPUTS) != 0,
        "each of {tp} ranks would get {width}/{tp} inputs of an expert's down projection, and the NPU's W4A8 matmul "
        "takes multiples of 64: use --ep, or fewer ranks",
    ),
)

ENGINES: Mapping[str, Engine] = {
    "vllm-ascend": Engine(
        ("0.23.0", "0.30.0rc2"),
        (
            *_COMMON,
            Requirement(
                lambda p: p.slices_w4a8 and BIAS_COLUMNS % p.tp != 0,
                "W4A8 experts hold 16 partial sums of scale_bias, which {tp} ranks cannot share: use --ep, or a --tp "
                "of 1, 2, 4, 8 or 16",
            ),
            Requirement(
                lambda p: not p.is_latent and p.config.rope.rope_type == "yarn" and p.config.rope.truncate,
                'YaRN\'s bounds are not rounded, as if truncate were false: write "truncate": false into the rope '
                "parameters of the source, for all loaders",
            ),
            Requirement(
                lambda p: not p.is_latent and p.config.rope.rope_type == "dynamic",
                "dynamic rope is computed otherwise, whatever config.json says: no deployment of it is right",
            ),
        ),
    ),
    "sglang": Engine(
        ("0.5.23",),
        (
            *_COMMON,
            Requirement(
                lambda p: not p.is_latent and p.config.rope.attention_factor is not None,
                "attention_factor of YaRN is not read: remove it from the source",
            ),
            Requirement(
                lambda p: p.experts is Scheme.FLOAT,
                "FLOAT routed experts are refused: convert with a recipe that quantizes them",
            ),
            Requirement(
                lambda p: p.slices_w4a8,
                "each of {tp} ranks adds the scale_bias of all of them to the down projection's output: the model "
                "would load and compute garbage; use --ep (--ep-size {tp} of the server)",
            ),
        ),
    ),
}


def check_placement(directory: Path, engine: str, tp: int, ep: bool, family: str | None = None) -> tuple[str, ...]:
    """The problems of running the artifact on `tp` ranks of `engine` (a key of ENGINES), a line each: parameters
    without a tensor, tensors without a parameter, and broken requirements on ranks.

    Reads config.json and the description alone; a config of unknown model_type as that of `family`. Raises
    CheckpointError and ArtifactError when it cannot.
    """
    raw = config_as(directory, read_config(directory), family)
    config, schemes = ModelConfig.from_dict(raw), read_description(directory)
    if schemes is None:
        raise ArtifactError(f"{directory}: no {DESCRIPTION_NAME}: engines would take it for an unquantized model")
    keys = read_description_keys(directory)
    return (*loading_problems(engine, raw, schemes, keys), *placement_problems(engine, config, schemes, tp, ep))


def tested_releases(engine: str) -> str:
    """An engine (a key of ENGINES) with the releases that were tested: "vllm-ascend 0.23.0 and 0.30.0rc2"."""
    return f"{engine} {' and '.join(ENGINES[engine].releases)}"


def loading_problems(
    engine: str, raw: Mapping[str, Any], schemes: Mapping[str, Scheme], keys: Mapping[str, Any]
) -> Iterator[str]:
    """A line for each way in which `engine` would fail to load an artifact with this config.json and description, or
    misread it, on any number of ranks. `keys`: the description's keys that name no tensor."""
    for problem in parameter_problems(engine, raw, schemes):
        yield f"{tested_releases(engine)}: {problem}"
    for releases, problem in key_problems(engine, raw, schemes, keys):
        yield f"{engine} {' and '.join(releases)}: {problem}"


def engine_notes(
    config: ModelConfig, schemes: Mapping[str, Scheme], unknown: Sequence[str], specs: Mapping[str, Spec]
) -> Iterator[str]:
    """A line for each problem of an artifact with these weights on any placement; `unknown` tensors are copied."""
    yield from slow_path_notes(specs, schemes)
    for engine in ENGINES:
        yield from placement_problems(engine, config, schemes, 1, False)
        yield from loading_notes(engine, config, schemes)
        refused = refused_names(engine, config.family, unknown)
        if refused:
            yield (
                f"{tested_releases(engine)} has no parameter for tensor {refused[0]!r} and will not load the artifact: "
                "if no loader needs it, remove it from the checkpoint"
            )


def loading_notes(engine: str, config: ModelConfig, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """A line for each part that `engine` cannot load of an artifact that it runs, for what it needs to load the
    artifact, and for each of its releases that cannot load it while another does."""
    for note in (*draft_notes(engine, config, schemes), *variable_notes(engine, config)):
        yield f"{tested_releases(engine)}: {note}"
    notes = (
        *indexer_notes(engine, config, schemes),
        *dense_notes(engine, config, schemes),
        *clamp_notes(engine, config),
    )
    for releases, note in notes:
        yield f"{engine} {' and '.join(releases)}: {note}"


def slow_path_notes(specs: Mapping[str, Spec], schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """A line where an engine computes rightly, but without its fused operators, in a model with these tensors."""
    slow = [
        parts["index_q"].name
        for parts in sparse_layers(specs)
        if "index_q" in parts
        and schemes.get(parts["q_a"].name) is Scheme.W8A8
        and schemes.get(parts["index_q"].name) is Scheme.FLOAT
    ]
    if slow:
        yield (
            f"{tested_releases('vllm-ascend')}: {slow[0]!r} is FLOAT in {len(slow)} layer(s), so that attention "
            "there takes many small operators instead of a fused one; give the role indexer W8A8_DYNAMIC"
        )


def placement_problems(
    engine: str, config: ModelConfig, schemes: Mapping[str, Scheme], tp: int, ep: bool
) -> Iterator[str]:
    """A line for each requirement of `engine` (a key of ENGINES) that `tp` ranks break; `schemes`: the description."""
    yield from broken_requirements(engine, Placement(config, _expert_scheme(config, schemes), tp, ep))


def broken_requirements(engine: str, placement: Placement) -> Iterator[str]:
    """A line for each requirement of `engine` (a key of ENGINES) that a placement breaks."""
    config, tp = placement.config, placement.tp
    numbers = {
        "tp": tp,
        "rope": config.rope.rope_type,
        "dense": placement.dense_width,
        "shared": placement.shared_width,
        "heads": config.attention.heads,
        "rank_heads": placement.rank_heads,
        "kv_heads": config.attention.kv_heads,
        "experts": config.n_routed_experts,
        "width": placement.expert_width,
    }
    for requirement in ENGINES[engine].requirements:
        if requirement.broken(placement):
            yield f"{tested_releases(engine)}: {requirement.why.format(**numbers)}"


def _expert_scheme(config: ModelConfig, schemes: Mapping[str, Scheme]) -> Scheme | None:
    found = set()
    for layer in filter(config.moe_at, range(config.num_hidden_layers)):
        scheme = schemes.get(config.name(Block.EXPERT, "down", layer, expert=0))
        if scheme is not None:
            found.add(scheme)
    # One W4A8 layer is enough for the requirements on W4A8.
    return Scheme.W4A8 if Scheme.W4A8 in found else next(iter(found), None)
