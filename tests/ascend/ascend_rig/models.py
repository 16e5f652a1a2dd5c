"""Small random checkpoints in the shapes of the supported families, with the attention sizes that the NPU fixes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npuq.convert import convert_checkpoint
from npuq.formats.artifact import DESCRIPTION_NAME, KV_CACHE_NAME, ROPE_NAME
from npuq.formats.kv_cache import save_scales, storable_scale
from npuq.formats.static_w8a8 import InputScale, static_tensors

ATTENTION = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_COMMON: dict[str, Any] = {
    **ATTENTION,
    "torch_dtype": "bfloat16",
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "eos_token_id": 1,
}

# DeepSeek-V2-Lite: no q_lora, softmax router without groups or bias, two shared experts, YaRN with mscale. The dense
# block's 200 channels do not fill tiles of FRACTAL_NZ.
V2_LITE = {
    **_COMMON,
    "intermediate_size": 200,
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4,
        "original_max_position_embeddings": 128,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}

# Kimi-K2: V3's shape with more experts and a single group.
KIMI = {
    **_COMMON,
    "model_type": "kimi_k2",
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "n_routed_experts": 24,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
}

# DeepSeek-V3 with sizes that npu_mla_prolog_v3 documents.
PROLOG = {
    **KIMI,
    "model_type": "deepseek_v3",
    "hidden_size": 1024,
    "q_lora_rank": 1536,
    "n_routed_experts": 16,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 2.5,
}

# GLM-4.7-Flash: its own widths of heads, as many of them as no operator takes, and a q_lora that no prolog takes.
GLM_FLASH = {
    **KIMI,
    "model_type": "glm4_moe_lite",
    "num_attention_heads": 20,
    "q_lora_rank": 768,
    "qk_nope_head_dim": 192,
    "v_head_dim": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "routed_scaling_factor": 1.8,
    "rope_theta": 1000000,
}

# As many heads of V3's widths; with the second, all sizes but their number are those that the prolog takes.
TWENTY_HEADS = {**KIMI, "num_attention_heads": 20}
PROLOG_BUT_HEADS = {**PROLOG, "num_attention_heads": 20}


# DeepSeek-V3.2 and GLM-5: a query attends to 8 tokens. The indexer has the width that its operator takes.
_SPARSE = {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 8}
V32 = {
    **KIMI,
    **_SPARSE,
    "model_type": "deepseek_v32",
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "rope_scaling": {**V2_LITE["rope_scaling"], "mscale": 1.0, "mscale_all_dim": 1.0},
}
GLM_DSA = {
    **GLM_FLASH,
    **_SPARSE,
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "indexer_types": ["full", "full", "shared", "shared"],
    "rope_interleave": True,
    "indexer_rope_interleave": True,
}

# The same with sizes that npu_mla_prolog_v3 documents, and as many index heads as the two models have.
_PROLOG_SIZES = {"hidden_size": 1024, "index_n_heads": 64}
V32_PROLOG = {**V32, **_PROLOG_SIZES, "q_lora_rank": 1536}
GLM_DSA_PROLOG = {**GLM_DSA, **_PROLOG_SIZES, "q_lora_rank": 2048, "index_n_heads": 32}

# Grouped-query attention with heads of 128 channels: Qwen3-MoE, all of them rotary and normed, no shared experts;
# GLM-4.5, half of them rotary, with biases.
_GROUPED = {
    **{key: value for key, value in _COMMON.items() if key not in ATTENTION},
    "head_dim": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
QWEN3 = {
    **{key: value for key, value in _GROUPED.items() if key not in ("first_k_dense_replace", "moe_layer_freq")},
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "attention_bias": False,
}
GLM4 = {
    **_GROUPED,
    "model_type": "glm4_moe",
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
}

# As many heads as no operator takes.
GLM_DSA_SIX_HEADS = {**GLM_DSA, "num_attention_heads": 6}


def write_checkpoint(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A bf16 checkpoint of random weights, scaled so that activations keep their size."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(outputs: int, inputs: int) -> Tensor:
        return (torch.randn(outputs, inputs, generator=generator) / math.sqrt(inputs)).bfloat16()

    def gain(width: int) -> Tensor:
        return (1 + 0.1 * torch.randn(width, generator=generator)).bfloat16()

    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    tensors = {
        "model.embed_tokens.weight": torch.randn(vocabulary, hidden, generator=generator).bfloat16(),
        "model.norm.weight": gain(hidden),
        "lm_head.weight": matrix(vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = gain(hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = gain(hidden)
        for name, (outputs, inputs) in attention_shapes(config).items():
            tensors[f"{prefix}.self_attn.{name}.weight"] = matrix(outputs, inputs) if inputs else gain(outputs)
        if config.get("attention_bias"):
            for name in ("q_proj", "k_proj", "v_proj"):
                outputs, _ = attention_shapes(config)[name]
                bias = 0.2 * torch.randn(outputs, generator=generator)
                tensors[f"{prefix}.self_attn.{name}.bias"] = bias.bfloat16()
        for name, (outputs, inputs) in indexer_shapes(config, layer).items():
            tensors[f"{prefix}.self_attn.indexer.{name}.weight"] = matrix(outputs, inputs) if inputs else gain(outputs)
            if not inputs:
                bias = 0.1 * torch.randn(outputs, generator=generator)
                tensors[f"{prefix}.self_attn.indexer.{name}.bias"] = bias.bfloat16()
        mlps = {"mlp": config["intermediate_size"]}
        grouped = "kv_lora_rank" not in config
        qwen = "num_experts" in config
        if layer not in config["mlp_only_layers"] if qwen else layer >= config["first_k_dense_replace"]:
            experts = config["num_experts" if qwen else "n_routed_experts"]
            width = config["moe_intermediate_size"]
            mlps = {f"mlp.experts.{expert}": width for expert in range(experts)}
            if not qwen:
                mlps["mlp.shared_experts"] = width * config["n_shared_experts"]
            tensors[f"{prefix}.mlp.gate.weight"] = matrix(experts, hidden)
            if not qwen and (grouped or config["topk_method"] == "noaux_tc"):
                bias = 0.1 * torch.randn(experts, generator=generator)
                tensors[f"{prefix}.mlp.gate.e_score_correction_bias"] = bias
        for name, width in mlps.items():
            tensors[f"{prefix}.{name}.gate_proj.weight"] = matrix(width, hidden)
            tensors[f"{prefix}.{name}.up_proj.weight"] = matrix(width, hidden)
            tensors[f"{prefix}.{name}.down_proj.weight"] = matrix(hidden, width)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def write_k25(directory: Path) -> Path:
    """Kimi-K2.5: the checkpoint of KIMI as the text model of a vision model, its experts in packed int4."""
    from kimi_k25 import as_k25

    plain = write_checkpoint(directory.with_name(f"{directory.name}-plain"), KIMI)
    return as_k25(plain, directory)


def attention_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """name → (outputs, inputs); inputs 0 for a norm."""
    if "kv_lora_rank" not in config:
        hidden, width = config["hidden_size"], config["head_dim"]
        queries, keys = (config[f"num_{kind}_heads"] * width for kind in ("attention", "key_value"))
        shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        return shapes | {"o_proj": (hidden, queries), "q_norm": (width, 0), "k_norm": (width, 0)}
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    rope = config["qk_rope_head_dim"]
    queries = heads * (config["qk_nope_head_dim"] + rope)
    shapes = {
        "kv_a_proj_with_mqa": (latent + rope, hidden),
        "kv_a_layernorm": (latent, 0),
        "kv_b_proj": (heads * (config["qk_nope_head_dim"] + config["v_head_dim"]), latent),
        "o_proj": (hidden, heads * config["v_head_dim"]),
    }
    if config["q_lora_rank"] is None:
        return shapes | {"q_proj": (queries, hidden)}
    lora = config["q_lora_rank"]
    return shapes | {"q_a_proj": (lora, hidden), "q_a_layernorm": (lora, 0), "q_b_proj": (queries, lora)}


def indexer_shapes(config: dict[str, Any], layer: int) -> dict[str, tuple[int, int]]:
    """As `attention_shapes`, of a layer's lightning indexer; empty for a layer without one."""
    # An MTP layer, behind the listed ones, always has its own.
    if "index_topk" not in config or config.get("indexer_types", [])[layer : layer + 1] == ["shared"]:
        return {}
    hidden, heads, width = config["hidden_size"], config["index_n_heads"], config["index_head_dim"]
    return {
        "wq_b": (heads * width, config["q_lora_rank"]),
        "wk": (width, hidden),
        "k_norm": (width, 0),
        "weights_proj": (heads, hidden),
    }


# W4A8 with parts of attention in float. The second is the mix of Huawei's DeepSeek-V3.2-Exp: of what reads the hidden
# state or the latent of the queries, q_b alone is W8A8.
FLOAT_RECIPES = {
    "float-index-q": ["*.indexer.wq_b.weight"],
    "float-latents": ["*.indexer.wq_b.weight", "*.q_a_proj.weight", "*.kv_a_proj_with_mqa.weight"],
}


def write_recipe(path: Path, names: list[str]) -> Path:
    """A recipe file: the tensors of these names in float, the others as in W4A8."""
    rules: list[dict[str, object]] = [
        {"names": names, "scheme": "FLOAT"},
        {"roles": ["routed_expert"], "scheme": "W4A8_DYNAMIC"},
        {"roles": ["attention", "indexer", "dense_mlp", "shared_expert"], "scheme": "W8A8_DYNAMIC"},
    ]
    path.write_text(json.dumps({"name": "mixed", "target": "engines", "method": "minmax", "rules": rules}))
    return path


def quantize(source: Path, output: Path, recipe: str | Path) -> Path:
    """The artifact of a checkpoint, by the quickest method."""
    convert_checkpoint(source, output, recipe=recipe, method="minmax", workers=1)
    return output


def add_cache_scales(artifact: Path, output: Path) -> Path:
    """The artifact with scales for an int8 KV cache: a few times the norm's gain is the largest code."""
    shutil.copytree(artifact, output)
    config = json.loads((output / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for shard in output.glob("*.safetensors"):
        tensors |= load_file(shard)
    gains = [
        tensors[f"model.layers.{layer}.self_attn.kv_a_layernorm.weight"].float().abs()
        for layer in range(config["num_hidden_layers"])
    ]
    save_scales([storable_scale(4 * gain / 127) for gain in gains], output / KV_CACHE_NAME)
    return output


def make_static(artifact: Path, output: Path) -> Path:
    """The artifact with every W8A8_DYNAMIC linear turned into a static one of the same weights."""
    shutil.copytree(artifact, output, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    shutil.copy(artifact / ROPE_NAME, output / ROPE_NAME)
    tensors: dict[str, Tensor] = {}
    for shard in artifact.glob("*.safetensors"):
        tensors |= load_file(shard)
    description = json.loads((output / DESCRIPTION_NAME).read_text())
    for name in [name for name, kind in description.items() if kind == "W8A8_DYNAMIC" and name.endswith(".weight")]:
        prefix = name.removesuffix("weight")
        # Norms give a few units either way, values and swiglu less: some activations saturate, as they do in a model.
        inputs = InputScale.of_range(-3.5, 4.0)
        made = static_tensors(tensors[name], tensors[f"{prefix}weight_scale"], inputs)
        tensors |= {prefix + suffix: tensor for suffix, tensor in made.items()}
        description |= {prefix + suffix: "W8A8" for suffix in made}
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / DESCRIPTION_NAME).write_text(json.dumps(description))
    return output
