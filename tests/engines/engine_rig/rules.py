"""Artifacts that break one rule each: `npuq verify --engine` names the rule, and the engines end as is stated here."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from npuq.choices import ENGINES
from npuq.formats.artifact import DESCRIPTION_NAME
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.schemes import SUFFIXES, WEIGHT, Scheme, dequantize, quantize_rows
from npuq.formats.static_w8a8 import InputScale, static_tensors
from npuq.quant.scales import Method

from .corruption import LAYER, Corruption, Tags, Tensors, corrupt
from .parameter_lists import ENDS

LOADS = ""  # the rule is there for another engine or release


@dataclass(frozen=True)
class Rule:
    """told: words of `npuq verify --engine` for the engines in `by`. ends: words of the error that ends loading in each
    release, of the model or, with `mtp`, its draft. of: the artifact that breaks it."""

    told: str
    ends: Mapping[str, str]
    how: Corruption | None = None
    keys: Mapping[str, Any] = field(default_factory=dict)  # of the description
    config: Mapping[str, Any] = field(default_factory=dict)
    mtp: bool = False
    by: tuple[str, ...] = ENGINES
    of: str = "v3-mtp"


def _as(scheme: Scheme, *modules: str) -> Corruption:
    """These linears, rightly stored in another scheme."""

    def how(tensors: Tensors, tags: Tags) -> None:
        for module in modules:
            parts = [suffix for suffix in (WEIGHT, *SUFFIXES) if f"{module}.{suffix}" in tensors]
            held = {suffix: tensors.pop(f"{module}.{suffix}") for suffix in parts}
            was = Scheme(tags[f"{module}.weight"])
            for suffix in parts:
                del tags[f"{module}.{suffix}"]
            rows = held["weight"].float() if was is Scheme.FLOAT else dequantize(held, was)
            made = (
                {"weight": rows.bfloat16()}
                if scheme is Scheme.FLOAT
                else quantize_rows(rows, scheme, Method.MINMAX, row_parallel=module.endswith("down_proj")).tensors
            )
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in made.items()}
            tags |= {f"{module}.{suffix}": scheme.value for suffix in made}

    return how


def _static(*modules: str) -> Corruption:
    """These dynamic linears, rightly stored with a static input scale."""

    def how(tensors: Tensors, tags: Tags) -> None:
        for module in modules:
            inputs = InputScale.of_range(-4.0, 5.0)
            made = static_tensors(tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"], inputs)
            tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in made.items()}
            tags |= {f"{module}.{suffix}": Scheme.W8A8_STATIC.value for suffix in made}

    return how


def _unlisted(name: str) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        del tags[name]

    return how


def _listed(name: str) -> Corruption:
    def how(tensors: Tensors, tags: Tags) -> None:
        tags[name] = Scheme.FLOAT.value

    return how


def _experts(*names: str) -> list[str]:
    return [f"{LAYER}.mlp.experts.{expert}.{name}" for expert in range(16) for name in names]


_OLD, _NEW, _SGLANG = "vllm-ascend 0.23.0", "vllm-ascend 0.30.0rc2", "sglang 0.5.23"
RULES = {
    "a group size": Rule(
        "group_size 256",
        {_OLD: "RuntimeError", _NEW: "no longer supported", _SGLANG: LOADS},
        keys={"group_size": 256},
    ),
    "a rotation of the draft's input": Rule(
        "vllm-ascend 0.30.0rc2: is_rot_used is true",
        {_OLD: LOADS, _NEW: "'rot.weight'.*not loaded", _SGLANG: LOADS},
        keys={"is_rot_used": True},
        mtp=True,
        by=("vllm-ascend",),
    ),
    # SGLang multiplies by the scale as it takes the linear apart.
    "int8 kv_b_proj": Rule(
        "kv_b_proj.weight': the role",
        {_OLD: "AssertionError", _NEW: "AssertionError", _SGLANG: LOADS},
        _as(Scheme.W8A8, f"{LAYER}.self_attn.kv_b_proj"),
    ),
    "int8 router": Rule(
        "mlp.gate.weight': the role",
        dict.fromkeys((_OLD, _NEW, _SGLANG), "mlp.gate.weight_offset"),
        _as(Scheme.W8A8, f"{LAYER}.mlp.gate"),
    ),
    "int4 linear": Rule(
        "W4A8_DYNAMIC exists only for the main model's routed experts",
        {_OLD: "ZeroDivisionError", _NEW: "doesn't support quant_type=W4A8_DYNAMIC", _SGLANG: "RuntimeError"},
        _as(Scheme.W4A8, f"{LAYER}.self_attn.q_b_proj"),
    ),
    "FLOAT experts": Rule(
        "engines refuse FLOAT routed experts",
        {_OLD: LOADS, _NEW: LOADS, _SGLANG: "Unsupported ModelSlim MoE"},
        _as(Scheme.FLOAT, *_experts("gate_proj", "up_proj", "down_proj")),
    ),
    "experts of two schemes": Rule(
        "all experts of a layer need one scheme",
        {_OLD: "Not all shards", _NEW: "Not all shards", _SGLANG: LOADS},
        _as(Scheme.W8A8, *_experts("down_proj")),
    ),
    "fused linears of two schemes": Rule(
        "is FLOAT; engines fuse q_a_proj and kv_a_proj_with_mqa",
        {_OLD: "not all shards", _NEW: "Not all shards", _SGLANG: "not all shards"},
        _as(Scheme.FLOAT, f"{LAYER}.self_attn.q_a_proj"),
    ),
    # SGLang goes by q's scheme.
    "q and k of two schemes": Rule(
        "engines fuse q_proj and k_proj",
        {_OLD: "not all shards", _NEW: "Not all shards", _SGLANG: "not all shards"},
        _as(Scheme.FLOAT, f"{LAYER}.self_attn.k_proj"),
        of="glm-4.5",
    ),
    "a static linear with a bias": Rule(
        "engines leave out the bias",
        dict.fromkeys((_OLD, _NEW, _SGLANG), LOADS),
        _static(*(f"{LAYER}.self_attn.{part}_proj" for part in "qkv")),
        of="glm-4.5",
    ),
    "gate and up of two schemes": Rule(
        "is FLOAT; engines fuse gate_proj and up_proj",
        {_OLD: "not all shards", _NEW: "Not all shards", _SGLANG: "not all shards"},
        _as(Scheme.FLOAT, f"{LAYER}.mlp.shared_experts.gate_proj"),
    ),
    "a FLOAT weight without an entry": Rule(
        f"no entry for tensor '{LAYER}.self_attn.kv_b_proj.weight'",
        {_OLD: "KeyError", _NEW: LOADS, _SGLANG: r"Unsupported Linear modelslim scheme: \[''\]"},
        _unlisted(f"{LAYER}.self_attn.kv_b_proj.weight"),
    ),
    "a quantized weight without an entry": Rule(
        f"no entry for tensor '{LAYER}.self_attn.o_proj.weight'",
        {_OLD: "KeyError", _NEW: "KeyError", _SGLANG: "Unsupported Linear modelslim scheme"},
        _unlisted(f"{LAYER}.self_attn.o_proj.weight"),
    ),
    # Of two fused linears SGLang reads the first one's entry.
    "a fused weight without an entry": Rule(
        f"no entry for tensor '{LAYER}.self_attn.kv_a_proj_with_mqa.weight'",
        {_OLD: "KeyError", _NEW: "KeyError", _SGLANG: LOADS},
        _unlisted(f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight"),
    ),
    "an expert without an entry": Rule(
        f"no entry for tensor '{LAYER}.mlp.experts.0.down_proj.weight'",
        {_OLD: "KeyError", _NEW: "KeyError", _SGLANG: "Missing ModelSlim MoE"},
        _unlisted(f"{LAYER}.mlp.experts.0.down_proj.weight"),
    ),
    # As a server with `--quantization ascend` starts.
    "the source's quantization_config": Rule(
        "engines would ignore quant_model_description.json",
        {**dict.fromkeys((_OLD, _NEW), "does not match the quantization"), _SGLANG: "Missing ModelSlim MoE"},
        config={"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
    ),
    # On a device the bias would be zero, and cost time.
    "a norm's bias in the description": Rule(
        "k_norm.bias",
        dict.fromkeys((_OLD, _NEW, _SGLANG), r"norm\.bias'.*not loaded"),
        _listed(f"{LAYER}.self_attn.indexer.k_norm.bias"),
        of="v32",
    ),
}


def break_rule(rule: Rule, artifact: Path, folder: Path) -> Path:
    """A copy of the artifact that breaks the rule."""
    corrupt(artifact, folder, rule.how or (lambda tensors, tags: None))
    for name, changes in ((DESCRIPTION_NAME, rule.keys), ("config.json", rule.config)):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def ending(engine: ModuleType, directory: Path, mtp: bool) -> str:
    """The error with which one rank's loading ends; LOADS without.

    In a process of its own: some descriptions make an engine change its classes for the rest of a process.
    """
    fork = get_context("fork")
    here, there = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: there.send(_ending(engine, directory, mtp)))
    process.start()
    there.close()
    try:
        return here.recv()
    finally:
        process.join()


def _ending(engine: ModuleType, directory: Path, mtp: bool) -> str:
    with Checkpoint.open(directory) as checkpoint:
        weights = ((name, checkpoint.read(name)) for name in checkpoint.tensors)
        try:
            engine.build(directory, weights, 1, 1, 0, mtp)
        except ENDS as end:
            return f"{type(end).__name__}: {end}"
    return LOADS
