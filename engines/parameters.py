"""The parameters that an engine creates for a model, against the tensors of an artifact: each parameter needs a tensor,
and each tensor a parameter.

A parameter without a tensor keeps random memory, and the engine computes with it; a tensor without a parameter ends
loading in an error, or is skipped. Each engine's list is the family's table (`models/families`) and the differences of
the engine's classes, which it chooses by `architectures` of config.json. They were read from constructors and
`load_weights`, and are tested by loading artifacts with every tensor left out in turn (tests/engines).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ..formats.artifact import is_described
from ..formats.schemes import BIAS, DEQ_SCALE, INPUT_OFFSET, INPUT_SCALE, OFFSET, QUANT_BIAS, SCALE, WEIGHT, Scheme
from ..models.config import ModelConfig, text_config
from ..models.config_reader import shown
from ..models.family import Block, Family
from ..models.hash_moe import HashMoe
from ..models.moe import DenseFirst
from ..models.roles import Role
from ..models.tensors import ModelTensors, Spec

_PARTS: Final[Mapping[Scheme, tuple[str, ...]]] = {
    Scheme.W4A8: (WEIGHT, SCALE, OFFSET, BIAS),
    Scheme.W8A8: (WEIGHT, SCALE, OFFSET),
    Scheme.W8A8_STATIC: (WEIGHT, INPUT_SCALE, INPUT_OFFSET, DEQ_SCALE, QUANT_BIAS),
}
# Both engines create these parameters and never multiply by them: ModelSlim leaves them out.
_UNUSED: Final[Mapping[Scheme, tuple[str, ...]]] = {Scheme.W8A8_STATIC: (SCALE, OFFSET)}


# The types of keys that transformers' configuration classes, which both engines use, insist on.
_TYPES: Final[Mapping[str, type]] = {
    "n_shared_experts": int,
    "routed_scaling_factor": float,
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
    "attention_bias": bool,
    "hidden_act": str,
}
_STOPS: Final = object()  # the engine would not start


@dataclass(frozen=True)
class EngineModel:
    """The differences of an engine's classes from config.json and the family's table, in reading and loading."""

    architectures: tuple[str, ...]  # the names of config.json's `architectures` that build it
    absent: Mapping[str, object]  # defaults of missing or null keys that differ from transformers'
    ties_head: bool  # tied in config.json: the embedding is the head, and a stored head is ignored
    builds_empty_shared: bool  # shared experts of width 0 where n_shared_experts is 0, which want their tensors
    skips_uncounted: bool  # the main model skips all layers behind its own, counted in config.json or not
    drafts: Callable[[ModelConfig], Collection[int]]  # the MTP layers that its draft model has
    draft_always_routes: bool  # the draft's layer has experts for any moe_layer_freq
    refuses: Callable[[str], bool]  # True where loading fails at a tensor of that name without a parameter
    loads_draft: bool = True  # False: its draft model finds no scheme of a quantized linear
    # Releases whose draft multiplies hidden states by `rot.weight` where the description says is_rot_used.
    turns_draft_input: tuple[str, ...] = ()
    # Releases whose main model has an indexer in layers that share another layer's selection, too.
    indexes_everywhere: tuple[str, ...] = ()
    # Releases whose main model takes quantized dense layers for unquantized ones.
    floats_dense: tuple[str, ...] = ()
    always_routes: bool = False  # every layer of the main model has experts, whatever config.json says
    always_has_router_bias: bool = False  # a correction bias of the router even where topk_method is not spelt out


def _counted(config: ModelConfig) -> range:
    return range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)


def _refused_by_vllm(name: str) -> bool:
    return not name.endswith(".bias") and "rotary_emb.inv_freq" not in name


# Of tensors without a parameter vLLM's Qwen3-MoE skips those of these endings.
_IGNORED_BY_QWEN3_MOE: Final = (".bias", "_bias", ".weight_scale", "_weight_scale", ".input_scale", "_input_scale")


def _refused_by_sglang(name: str) -> bool:
    """SGLang only warns, except for tensors that it stacks: their parameters are not looked for first."""
    stacked = any(projection in name for projection in ("gate_proj", "up_proj"))
    return stacked and "mlp.experts." not in name and not name.endswith(".bias")


_DEEPSEEK = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
_VLLM = EngineModel(
    architectures=_DEEPSEEK,
    absent={"topk_method": None, "scoring_func": "softmax"},
    ties_head=False,
    builds_empty_shared=True,
    skips_uncounted=False,
    drafts=_counted,
    draft_always_routes=False,
    refuses=_refused_by_vllm,
    turns_draft_input=("0.30.0rc2",),
)
_SGLANG = EngineModel(
    architectures=_DEEPSEEK,
    absent={"topk_method": _STOPS, "scoring_func": _STOPS, "moe_layer_freq": _STOPS},
    ties_head=True,
    builds_empty_shared=False,
    skips_uncounted=True,
    drafts=lambda config: (config.num_hidden_layers,),
    draft_always_routes=True,
    refuses=_refused_by_sglang,
)
_VLLM_GLM = replace(
    _VLLM,
    architectures=("Glm4MoeLiteForCausalLM",),
    absent={"first_k_dense_replace": _STOPS},
    always_has_router_bias=True,
)
_SGLANG_GLM = replace(
    _SGLANG,
    architectures=("Glm4MoeLiteForCausalLM",),
    absent={"first_k_dense_replace": _STOPS},
    ties_head=False,
    builds_empty_shared=True,
    always_has_router_bias=True,
    refuses=lambda name: False,
    loads_draft=False,  # it looks for the layer as model.decoder in the description
)
# DeepSeek's classes under a prefix, beside a vision tower.
_VLLM_KIMI_K25 = replace(_VLLM, architectures=("KimiK25ForConditionalGeneration",))
_SGLANG_KIMI_K25 = replace(_SGLANG, architectures=("KimiK25ForConditionalGeneration",))
# DeepSeek's classes with an indexer. Without index_topk they are dense; vLLM reads no list of indexer_types.
_SPARSE: Final[Mapping[str, object]] = {"index_topk": None, "indexer_rope_interleave": False}
_SPARSE_VLLM, _SPARSE_SGLANG = (
    replace(_VLLM, absent={**_VLLM.absent, **_SPARSE, "index_topk_pattern": None}, indexes_everywhere=("0.23.0",)),
    replace(_SGLANG, absent={**_SGLANG.absent, **_SPARSE}),
)
_VLLM_V32, _SGLANG_V32, _VLLM_GLM5, _SGLANG_GLM5 = (
    replace(model, architectures=(architecture,))
    for architecture in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM")
    for model in (_SPARSE_VLLM, _SPARSE_SGLANG)
)
# Grouped-query attention. Neither engine tells of a tensor that it has no use for, but vLLM of one of GLM-4.5.
_VLLM_QWEN3_MOE = replace(
    _VLLM,
    architectures=("Qwen3MoeForCausalLM",),
    absent={},
    ties_head=True,
    refuses=lambda name: not name.endswith(_IGNORED_BY_QWEN3_MOE) and _refused_by_vllm(name),
    # vLLM 0.30 learns that gate_up_proj is fused after it has told the quantization.
    floats_dense=("0.30.0rc2",),
)
_VLLM_GLM4_MOE = replace(_VLLM_GLM, architectures=("Glm4MoeForCausalLM",), absent={"head_dim": _STOPS})
_SGLANG_QWEN3_MOE = replace(
    _SGLANG,
    architectures=("Qwen3MoeForCausalLM",),
    absent={},
    ties_head=False,
    always_routes=True,
    refuses=lambda name: False,
)
_SGLANG_GLM4_MOE = replace(_SGLANG_GLM, architectures=("Glm4MoeForCausalLM",), absent={})
# By the architecture of a family.
MODELS: Final[Mapping[str, Mapping[str, EngineModel]]] = {
    engine: {name: model for model in models for name in model.architectures}
    for engine, models in {
        "vllm-ascend": (
            _VLLM,
            _VLLM_KIMI_K25,
            _VLLM_GLM,
            _VLLM_V32,
            _VLLM_GLM5,
            _VLLM_QWEN3_MOE,
            _VLLM_GLM4_MOE,
        ),
        "sglang": (
            _SGLANG,
            _SGLANG_KIMI_K25,
            _SGLANG_GLM,
            _SGLANG_V32,
            _SGLANG_GLM5,
            _SGLANG_QWEN3_MOE,
            _SGLANG_GLM4_MOE,
        ),
    }.items()
}


@dataclass(frozen=True)
class Tensors:
    """The tensors that one model of an engine reads: needed and optional ones."""

    needed: frozenset[str]
    optional: frozenset[str]


def main_tensors(model: EngineModel, raw: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> Tensors:
    """The tensors that the main model reads of an artifact with this config.json and description."""
    config = _as_read(model, raw)
    tied = model.ties_head and config.tie_word_embeddings
    specs = [spec for spec in ModelTensors(config).unroll(()) if not (tied and spec.role is Role.HEAD)]
    return _by_need(specs, schemes)


def draft_tensors(model: EngineModel, raw: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> Tensors:
    """The tensors that the MTP draft model reads beside the embedding and the head of the main model."""
    config = _as_read(model, raw)
    layers = model.drafts(config)
    if model.draft_always_routes:
        config = _with_moe(config, layers=DenseFirst(0))
    return _by_need(list(ModelTensors(config).unroll(layers, main=False)), schemes)


def parameter_problems(engine: str, raw: Mapping[str, Any], schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """A line for each way in which `engine` (a key of MODELS) would fail to load the artifact, or misread it.

    `raw` is its config.json, `schemes` its description, which names every tensor. Raises CheckpointError for a config
    that cannot be read.
    """
    config = ModelConfig.from_dict(raw)
    model, names = MODELS[engine].get(config.family.architecture), schemes.keys()
    if model is None:
        yield f"npuq does not know what it reads of a {config.model_type}: whether it would load is not checked"
        return
    named = raw.get("architectures")
    if not isinstance(named, list) or not named or named[0] not in model.architectures:
        yield f"config.json: architectures is {shown(named)}: the first must be {' or '.join(model.architectures)}"
    yield from (f"config.json: {problem}" for problem in _misread(model, text_config(raw), config, names))
    main, draft = main_tensors(model, raw, schemes), draft_tensors(model, raw, schemes)
    yield from _missing(sorted(filter(is_described, main.needed - names)), "")
    if any(config.layer_of(name) in model.drafts(config) for name in names):
        yield from _missing(sorted(filter(is_described, draft.needed - names)), " of the MTP draft")
    surplus = {name for name in names - main.needed - main.optional if not config.family.passes_through(name)}
    refused = sorted(name for name in surplus if model.refuses(name) and not _skipped(model, config, name))
    if refused:
        yield (
            f"no parameter for tensor {refused[0]!r}{_more(refused)}: loading ends in an error; if no loader needs it, "
            "remove it from the source and convert again"
        )


def draft_notes(engine: str, config: ModelConfig, schemes: Mapping[str, Scheme]) -> Iterator[str]:
    """A line where `engine` runs the model and cannot load its MTP draft."""
    model = MODELS[engine].get(config.family.architecture)
    if model is None or model.loads_draft:
        return
    main = config.num_hidden_layers
    quantized = (name for name, scheme in schemes.items() if scheme is not Scheme.FLOAT)
    if any((layer := config.layer_of(name)) is not None and layer >= main for name in quantized):
        yield "the MTP draft finds no scheme of its quantized linears and does not load: serve without speculation"


def indexer_notes(
    engine: str, config: ModelConfig, schemes: Mapping[str, Scheme]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """A line where releases of `engine` look for indexers that layers of the artifact do not have, and the releases."""
    model = MODELS[engine].get(config.family.architecture)
    if model is None or not model.indexes_everywhere or config.attention.dense_tokens is None:
        return
    own = (config.name(Block.ATTENTION, "index_q", layer) for layer in range(config.num_hidden_layers))
    lacking = [name for name in own if name not in schemes]
    if lacking:
        yield (
            model.indexes_everywhere,
            f"{len(lacking)} layer(s) share another layer's selection and have no indexer, and the engine ends in a "
            f"KeyError at {lacking[0]!r}: serve with a later release",
        )


def dense_notes(
    engine: str, config: ModelConfig, schemes: Mapping[str, Scheme]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """A line where releases of `engine` find no scheme of the artifact's quantized dense layers, and the releases."""
    model = MODELS[engine].get(config.family.architecture)
    if model is None or not model.floats_dense:
        return
    gates = (config.name(Block.DENSE, "gate", layer) for layer in range(config.num_hidden_layers))
    quantized = [name for name in gates if schemes.get(name, Scheme.FLOAT) is not Scheme.FLOAT]
    if quantized:
        yield (
            model.floats_dense,
            f"{len(quantized)} dense layer(s) are quantized, and the engine takes them for unquantized and ends at "
            f"{quantized[0]!r}: serve with another release, or convert with dense_mlp in FLOAT",
        )


# Releases whose quantized routed experts compute silu(gate) · up without a limit.
_UNCLAMPED: Final[Mapping[str, tuple[str, ...]]] = {"vllm-ascend": ("0.23.0",), "sglang": ("0.5.23",)}


def clamp_notes(engine: str, config: ModelConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """A line where releases of `engine` leave out the limit of the routed experts' activations, and the releases."""
    if isinstance(config.moe, HashMoe):
        yield (
            _UNCLAMPED[engine],
            f"the routed experts are computed without swiglu_limit {config.moe.swiglu_limit:g}, which costs accuracy: "
            "serve with vllm-ascend 0.30.0rc2",
        )


# Environment variables without which SGLang does not load an artifact, by architecture. By default it fuses wq_a and
# wkv of DeepSeek-V4 into one linear, which no description names: it becomes bfloat16, and int8 codes do not fit.
SGLANG_VARIABLES: Final[Mapping[str, str]] = {"DeepseekV4ForCausalLM": "SGLANG_OPT_FUSE_WQA_WKV=0"}


def variable_notes(engine: str, config: ModelConfig) -> Iterator[str]:
    """A line where `engine` needs an environment variable to load an artifact of the model."""
    needed = SGLANG_VARIABLES.get(config.family.architecture) if engine == "sglang" else None
    if needed:
        yield f"start it with {needed} in its environment: otherwise loading ends in an AssertionError about a dtype"


def key_problems(
    engine: str, raw: Mapping[str, Any], schemes: Mapping[str, Scheme], keys: Mapping[str, Any]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """A line for each key of the description that makes releases of `engine` compute something else, and the releases.

    `keys`: the description's keys that name no tensor.
    """
    config = ModelConfig.from_dict(raw)
    model = MODELS[engine].get(config.family.architecture)
    if model is None or not model.turns_draft_input:
        return
    drafts = model.drafts(config)
    if keys.get("is_rot_used") and any(config.layer_of(name) in drafts for name in schemes):
        yield (
            model.turns_draft_input,
            "is_rot_used is true in the description: the MTP draft would multiply hidden states by rot.weight. An "
            "artifact of npuq needs no such product, its eh_proj is already rotated: remove the key",
        )


def refused_names(engine: str, family: Family, names: Collection[str]) -> list[str]:
    """The tensors among `names`, all without a parameter, at which `engine` would fail to load an artifact."""
    model = MODELS[engine].get(family.architecture)
    return [] if model is None else [name for name in names if model.refuses(name)]


def _misread(model: EngineModel, raw: Mapping[str, Any], config: ModelConfig, names: Collection[str]) -> Iterator[str]:
    """A line for each of the text model's keys (`raw`) that the engine reads otherwise than npuq, and the value to
    write instead."""
    routing = config.moe_keys()
    read = {**config.attention.stated(), **routing}
    for key, taken in [(key, taken) for key, taken in model.absent.items() if key in read]:
        wanted = read[key]
        if raw.get(key) is None and not (taken == wanted or (taken is None and wanted == "greedy")):
            does = "not start" if taken is _STOPS else "take none" if taken is None else f"take {taken!r}"
            yield f"{key} is missing: the engine would {does}; write {wanted!r}"
    for key in [key for key in ("n_group", "topk_group") if key in routing]:
        if key in raw and raw[key] is None and config.moe is not None and config.moe.topk_method != "greedy":
            yield f"{key} is null: the engine would not start; write {routing[key]}"
        elif raw.get(key, routing[key]) != routing[key]:
            yield f"{key} is {shown(raw[key])}, and the engine goes by groups under greedy too; write 1"
    for key, kind in _TYPES.items():
        if key in raw and type(raw[key]) is not kind:
            yield f"{key} is {shown(raw[key])}: the engine would not start; write a value of type {kind.__name__}"
    if "num_nextn_predict_layers" in raw and raw["num_nextn_predict_layers"] is None:
        yield "num_nextn_predict_layers is null: the engine would not start; write a number"
    head = config.name(Block.TOP, "head")
    if model.ties_head and config.tie_word_embeddings and head in names:
        yield f"tie_word_embeddings is true: the engine would read over the stored {head!r}; write false"


def _as_read(model: EngineModel, raw: Mapping[str, Any]) -> ModelConfig:
    """The config as the engine's classes read it: DeepSeek's have no correction bias where topk_method is missing."""
    config, raw = ModelConfig.from_dict(raw), text_config(raw)
    if raw.get("topk_method") != "noaux_tc" and not model.always_has_router_bias:
        config = _with_moe(config, topk_method="greedy")
    if model.always_routes:
        config = _with_moe(config, layers=DenseFirst(0))
    if model.builds_empty_shared and raw.get("n_shared_experts") == 0:
        config = _with_moe(config, n_shared_experts=1)
    return config


def _with_moe(config: ModelConfig, **changes: Any) -> ModelConfig:
    return config if config.moe is None else replace(config, moe=replace(config.moe, **changes))


def _skipped(model: EngineModel, config: ModelConfig, name: str) -> bool:
    """True where the main model skips a tensor because of its layer."""
    layer = config.layer_of(name)
    if layer is None or layer < config.num_hidden_layers:
        return False
    return model.skips_uncounted or layer in _counted(config)


def _by_need(specs: Sequence[Spec], schemes: Mapping[str, Scheme]) -> Tensors:
    parts: set[str] = set()
    spare: set[str] = set()
    for spec in specs:
        scheme = schemes.get(spec.name, Scheme.FLOAT)
        prefix = spec.name.removesuffix(WEIGHT)
        stored = {prefix + suffix for suffix in _PARTS[scheme]} if scheme in _PARTS else {spec.name}
        (spare if spec.optional else parts).update(stored)
        spare |= {prefix + suffix for suffix in _UNUSED.get(scheme, ())}
    return Tensors(frozenset(parts), frozenset(spare))


def _missing(names: list[str], whose: str) -> Iterator[str]:
    if names:
        yield (
            f"parameter {names[0]!r}{_more(names)}{whose} has no tensor in the artifact: the engine would not start, "
            "or compute with whatever is in memory; convert again"
        )


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
