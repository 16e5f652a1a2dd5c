"""npuq's lists of what an engine reads (engines/parameters.py) against what it does without each tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from npuq.engines.parameters import (
    MODELS,
    EngineModel,
    dense_notes,
    draft_tensors,
    indexer_notes,
    main_tensors,
    parameter_problems,
)
from npuq.engines.placement import check_placement
from npuq.errors import ArtifactError, CheckpointError
from npuq.formats.artifact import read_description
from npuq.formats.checkpoint import Checkpoint, read_config
from npuq.formats.schemes import Scheme
from npuq.models.config import ModelConfig

from .corruption import Corruption, Tags, Tensors, corrupt

# How an engine's loading ends when something is missing or too much.
ENDS = (
    ArtifactError,
    ValueError,
    KeyError,
    AssertionError,
    RuntimeError,
    TypeError,
    AttributeError,
    StrictDataclassError,
    ZeroDivisionError,
)
# Of a layer's experts this one: all are loaded alike.
EXPERT = "experts.15."
SURPLUS = (
    "extra.weight",
    "model.extra",
    "model.layers.0.self_attn.extra.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.self_attn.o_proj.bias",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.layers.0.mlp.shared_experts.up_proj.weight",
    "model.layers.1.mlp.gate_proj.weight",
    "model.layers.1.mlp.experts.16.gate_proj.weight",
    "model.layers.9.input_layernorm.weight",
)


def loads(
    engine: ModuleType, directory: Path, mtp: bool, *, without: str = "", beside: str = "", warned: bool = False
) -> bool:
    """Whether one rank of the model (or its draft) is loaded whole, with a tensor less or one more.

    SGLang only warns of a tensor without a parameter, which counts as loaded where `warned` is true.
    """
    with Checkpoint.open(directory) as checkpoint:

        def weights() -> Iterator[tuple[str, Tensor]]:
            yield from ((name, checkpoint.read(name)) for name in checkpoint.tensors if name != without)
            if beside:
                yield beside, torch.ones(8, 8, dtype=torch.bfloat16)

        try:
            engine.build(directory, weights(), 1, 1, 0, mtp)
        except ENDS as end:
            return warned and "not found in params_dict" in str(end)
    return True


def model_of(name: str, directory: Path) -> tuple[EngineModel, dict[str, Any], dict[str, Scheme]]:
    raw, schemes = read_config(directory), read_description(directory)
    assert schemes is not None
    return MODELS[name][ModelConfig.from_dict(raw).family.architecture], raw, schemes


def refused_by(release: str, directory: Path) -> list[str]:
    """What npuq says of an artifact that this release does not load, and others of the engine do."""
    name, _, version = release.partition(" ")
    _, raw, schemes = model_of(name, directory)
    config = ModelConfig.from_dict(raw)
    notes = (*indexer_notes(name, config, schemes), *dense_notes(name, config, schemes))
    return [why for releases, why in notes if version in releases]


def check_needed(release: str, engine: ModuleType, directory: Path, mtp: bool) -> None:
    """The engine misses exactly the tensors that the list has, of all that the artifact has.

    A draft that the list says is not loaded is not, nor an artifact that npuq says this release refuses.
    """
    model, raw, schemes = model_of(release.partition(" ")[0], directory)
    if (mtp and not model.loads_draft) or refused_by(release, directory):
        assert not loads(engine, directory, mtp)
        return
    tensors = (draft_tensors if mtp else main_tensors)(model, raw, schemes)
    needed = tensors.needed
    family = ModelConfig.from_dict(raw).family
    # The description leaves the biases of norms out; of a vision tower npuq has no table.
    with Checkpoint.open(directory) as checkpoint:
        stored = [name for name in checkpoint.tensors if not family.passes_through(name)]
    assert needed <= set(stored)
    assert loads(engine, directory, mtp)
    for tensor in stored:
        if ".experts." in tensor and EXPERT not in tensor:
            continue
        # Static linears have parameters for these two, and their operators do not get them.
        if tensor in tensors.optional and tensor.endswith(("weight_scale", "weight_offset")):
            continue
        # Of two fused linears, which share an input, one suffices.
        if ".input_" in tensor and tensor.split(".")[-2] in ("gate_proj", "up_proj", "q_a_proj", "kv_a_proj_with_mqa"):
            continue
        assert loads(engine, directory, mtp, without=tensor) == (tensor not in needed), tensor


def check_surplus(name: str, engine: ModuleType, directory: Path, tensor: str) -> None:
    """A tensor that no list has ends loading where npuq says so."""
    _, raw, schemes = model_of(name, directory)
    told = [line for line in parameter_problems(name, raw, {**schemes, tensor: Scheme.FLOAT}) if repr(tensor) in line]
    assert loads(engine, directory, False, beside=tensor, warned=True) == (not told), told


def drop(*parts: str) -> Corruption:
    """Remove every tensor whose name has one of these parts."""

    def how(tensors: Tensors, tags: Tags) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name], tags[name]

    return how


@dataclass(frozen=True)
class Variation:
    """An artifact with another config.json (... removes a key) or fewer tensors. `silent`: engines, or releases, that
    load it without a word, and compute something else."""

    config: dict[str, Any]
    how: Corruption | None = None
    silent: tuple[str, ...] = ()
    of: str = "v3-mtp"


VARIATIONS = {
    "as it is": Variation({}),
    "MTP layer not counted": Variation({"num_nextn_predict_layers": 0}),
    "MTP layers null": Variation({"num_nextn_predict_layers": None}),
    # The transformers that vLLM-Ascend 0.23.0 pins does not count one by itself, as newer ones do.
    "MTP layers unsaid": Variation({"num_nextn_predict_layers": ...}, silent=("vllm-ascend",)),
    "tied, with a head": Variation({"tie_word_embeddings": True}),
    "tied, without a head": Variation({"tie_word_embeddings": True}, drop("lm_head")),
    "without a head": Variation({}, drop("lm_head")),
    "tied null": Variation({"tie_word_embeddings": None}),
    "topk_method unsaid": Variation({"topk_method": ...}),
    "scoring_func unsaid": Variation({"scoring_func": ...}, silent=("vllm-ascend",)),
    "moe_layer_freq unsaid": Variation({"moe_layer_freq": ...}),
    "first_k_dense_replace unsaid": Variation({"first_k_dense_replace": ...}),
    "norm_topk_prob unsaid": Variation({"norm_topk_prob": ...}),
    "n_group null": Variation({"n_group": None}),
    "groups under greedy": Variation({"n_group": 4}, silent=("vllm-ascend", "sglang"), of="v2-lite"),
    "no shared experts": Variation({"n_shared_experts": 0}, drop("shared_experts")),
    "shared experts null": Variation({"n_shared_experts": None}, drop("shared_experts")),
    "a whole factor": Variation({"routed_scaling_factor": 2}),
    "experts by another name": Variation({"n_routed_experts": ..., "num_local_experts": 16}),
    "architectures unsaid": Variation({"architectures": ...}),
    "another architecture": Variation({"architectures": ["LlamaForCausalLM"]}),
    "GLM as it is": Variation({}, of="glm-flash"),
    "GLM, MTP layer not counted": Variation({"num_nextn_predict_layers": 0}, of="glm-flash"),
    "GLM, tied, with a head": Variation({"tie_word_embeddings": True}, of="glm-flash"),
    "GLM, first_k_dense_replace unsaid": Variation({"first_k_dense_replace": ...}, of="glm-flash"),
    "GLM, topk_method and scoring_func unsaid": Variation({"topk_method": ..., "scoring_func": ...}, of="glm-flash"),
    "GLM, moe_layer_freq unsaid": Variation({"moe_layer_freq": ...}, of="glm-flash"),
    "GLM, no shared experts": Variation({"n_shared_experts": 0}, drop("shared_experts"), of="glm-flash"),
    "GLM-4.5 as it is": Variation({}, of="glm-4.5"),
    "GLM-4.5, its switches unsaid": Variation({"attention_bias": ..., "use_qk_norm": ...}, of="glm-4.5"),
    "GLM-4.5, first_k_dense_replace unsaid": Variation({"first_k_dense_replace": ...}, of="glm-4.5"),
    "GLM-4.5, partial_rotary_factor unsaid": Variation({"partial_rotary_factor": ...}, of="glm-4.5"),
    "GLM-4.5, no shared experts": Variation({"n_shared_experts": 0}, drop("shared_experts"), of="glm-4.5"),
    "GLM-4.5, tied, with a head": Variation({"tie_word_embeddings": True}, of="glm-4.5"),
    "Qwen3-MoE as it is": Variation({}, of="qwen3-moe"),
    # The head is read over the embedding.
    "Qwen3-MoE, tied, with a head": Variation({"tie_word_embeddings": True}, silent=("vllm-ascend",), of="qwen3-moe"),
    "Qwen3-MoE, experts by another name": Variation({"num_experts": ..., "num_local_experts": 16}, of="qwen3-moe"),
    "Qwen3-MoE, all but sizes unsaid": Variation(
        {"norm_topk_prob": ..., "decoder_sparse_step": ..., "mlp_only_layers": ...}, of="qwen3-moe"
    ),
    "Qwen3-MoE with a dense layer": Variation({}, of="qwen3-dense"),
    "Kimi-K2.5 as it is": Variation({}, of="kimi-k2.5"),
    "V3.2 as it is": Variation({}, of="v32"),
    # Attention is then dense, and the tensors of indexers are skipped.
    "V3.2, index_topk unsaid": Variation({"index_topk": ...}, silent=("vllm-ascend 0.30.0rc2", "sglang"), of="v32"),
    "GLM-5 as it is": Variation({}, of="glm-5"),
    "GLM-5.2 as it is": Variation({}, of="glm-5.2"),
    "GLM-5, the indexer's rope unsaid": Variation(
        {"indexer_rope_interleave": ...}, silent=("vllm-ascend", "sglang"), of="glm-5"
    ),
    "GLM-5.2, shared layers as a list alone": Variation(
        {"index_topk_freq": ..., "index_skip_topk_offset": ...}, of="glm-5.2"
    ),
    "GLM-5.2, shared layers as a pattern": Variation(
        {"index_topk_freq": ..., "index_skip_topk_offset": ..., "index_topk_pattern": "FFS"}, of="glm-5.2"
    ),
}


def check_variation(release: str, engine: ModuleType, artifacts: Callable[[str], Path], folder: Path, key: str) -> None:
    """npuq says of an artifact what the engine does with it."""
    name, variation = release.partition(" ")[0], VARIATIONS[key]
    source = artifacts(variation.of)
    if variation.how is None:
        shutil.copytree(source, folder)
    else:
        corrupt(source, folder, variation.how)
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | variation.config
    path.write_text(json.dumps({name: value for name, value in raw.items() if value is not ...}))
    try:
        told = [*check_placement(folder, name, 1, False), *refused_by(release, folder)]
    except CheckpointError as error:
        told = [str(error)]
    silent = name in variation.silent or release in variation.silent
    assert loads(engine, folder, False) == (not told or silent), told
    assert told or not silent
