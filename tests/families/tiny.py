"""Tiny random models of every family: transformers writes them, and its implementation is the golden one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from calibrated import add_tokenizer
from kimi_k25 import write_k2_thinking, write_k25
from packed_v4 import write_random_release
from safetensors.torch import load_file, save_file
from torch import Tensor

SEED = 20240807
VOCABULARY = 320

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

# Keys of attention that these families do not have.
_NO_LATENT: dict[str, Any] = dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))

FAMILIES: dict[str, dict[str, Any]] = {
    "v2-lite": {
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v2": {
        "model_type": "deepseek_v2",
        "q_lora_rank": 48,
        "n_routed_experts": 16,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "group_limited_greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 16.0,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "v3": {
        "model_type": "deepseek_v3",
        "q_lora_rank": 48,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "moonlight": {
        "model_type": "deepseek_v3",
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "n_routed_experts": 12,
        "n_shared_experts": 2,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    },
    "kimi-k2": {
        "model_type": "kimi_k2",
        "q_lora_rank": 48,
        "n_routed_experts": 24,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.827,
        "rope_parameters": {**_YARN, "beta_fast": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    # Heads that are no power of two, the published widths over 4; two dense layers, as a list alone says.
    "glm-flash": {
        "model_type": "glm4_moe_lite",
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "q_lora_rank": 48,
        "qk_nope_head_dim": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 64,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "first_k_dense_replace": None,
        "mlp_layer_types": ["dense", "dense", "sparse"],
        "num_nextn_predict_layers": 1,
    },
    # Sparse attention, half of a prompt's tokens selected; 16 index heads, so that no two tokens score the same.
    "v32": {
        "model_type": "deepseek_v32",
        "q_lora_rank": 48,
        "index_n_heads": 16,
        "index_head_dim": 48,
        "index_topk": 32,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "glm-5": {
        "model_type": "glm_moe_dsa",
        "q_lora_rank": 48,
        "index_n_heads": 16,
        "index_head_dim": 48,
        "index_topk": 32,
        "indexer_types": ["full", "full", "shared"],
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    # Two query heads a key and value head, wider heads than hidden / heads.
    "qwen3-moe": {
        **_NO_LATENT,
        "first_k_dense_replace": None,
        "model_type": "qwen3_moe",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "glm-4.5": {
        **_NO_LATENT,
        "model_type": "glm4_moe",
        "num_key_value_heads": 2,
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "partial_rotary_factor": 0.5},
    },
}


# Stored in int4, by builders of their own.
PACKED = {"kimi-k2-thinking": write_k2_thinking, "kimi-k2.5": write_k25}
# Packed in FP8 and FP4 as it is released, and not calibrated.
V4 = "deepseek-v4"

# Of a model_type other than DeepSeek-V3's.
_CLASSES = {
    "deepseek_v2": "DeepseekV2",
    "glm4_moe_lite": "Glm4MoeLite",
    "deepseek_v32": "DeepseekV32",
    "qwen3_moe": "Qwen3Moe",
    "glm4_moe": "Glm4Moe",
    "glm_moe_dsa": "GlmMoeDsa",
}


def make_checkpoint(directory: Path, family: str, **changes: Any) -> Any:
    """Save a random float32 checkpoint of a family; the transformers model that holds the same weights."""
    if family in PACKED:
        return PACKED[family](directory, **changes)
    model = _random_model(family, changes)
    _save(model, directory, family, changes)
    return model


def make_source(directory: Path, family: str) -> Any:
    """Save a checkpoint as its publisher does: in bfloat16, with MTP layers and a tokenizer.

    Some channels of the norms' gains are large, as they are in trained models. Returns the transformers model that
    holds the same weights, in float32; none for DeepSeek-V4. MTP layers are random: transformers has none.
    """
    if family == V4:
        write_random_release(directory)
        return None
    if family in PACKED:
        model = PACKED[family](directory, torch.bfloat16, outliers=True)
        add_tokenizer(directory, VOCABULARY)
        return model
    model = _random_model(family, {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter[::16] *= 8.0
            parameter.copy_(parameter.bfloat16())
    _save(model, directory, family, {})
    file = directory / "model.safetensors"
    tensors = load_file(file)
    config = json.loads((directory / "config.json").read_text())
    _add_mtp(tensors, config)
    halves = {name: t if name.endswith("e_score_correction_bias") else t.bfloat16() for name, t in tensors.items()}
    save_file(halves, file, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    add_tokenizer(directory, config["vocab_size"])
    return model


def _settings(family: str, changes: dict[str, Any]) -> dict[str, Any]:
    settings = {**_COMMON, **FAMILIES[family], **changes}
    return {key: value for key, value in settings.items() if value is not None or key == "q_lora_rank"}


def _random_model(family: str, changes: dict[str, Any]) -> Any:
    import transformers

    settings = _settings(family, changes)
    name = _CLASSES.get(settings.pop("model_type"), "DeepseekV3")
    config = getattr(transformers, f"{name}Config")(**settings)
    torch.manual_seed(SEED)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Wide enough that every part of the model moves the logits; norms away from one.
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.2 if name.endswith("bias") else parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model


def _save(model: Any, directory: Path, family: str, changes: dict[str, Any]) -> None:
    settings = _settings(family, changes)
    model.save_pretrained(directory)
    path = directory / "config.json"
    saved = json.loads(path.read_text())
    saved["model_type"] = settings["model_type"]
    # The others' configs stay as transformers writes them.
    if saved["model_type"] not in ("glm4_moe_lite", "glm4_moe", "qwen3_moe"):
        saved["topk_method"] = settings.get("topk_method", "noaux_tc")
    path.write_text(json.dumps(saved))


def _add_mtp(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """MTP layers under DeepSeek's names: decoder layers like the last one, with embedding, head and projection."""
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    for layer in range(last + 1, last + 1 + config.get("num_nextn_predict_layers", 0)):
        prefix = f"model.layers.{layer}."
        for name in [name for name in tensors if name.startswith(f"model.layers.{last}.")]:
            tensors[prefix + name.removeprefix(f"model.layers.{last}.")] = tensors[name].flip(0).contiguous()
        # The last layer may attend to another's selection; an MTP layer selects by itself.
        for name in [name for name in tensors if name.startswith("model.layers.0.self_attn.indexer.")]:
            tensors[prefix + name.removeprefix("model.layers.0.")] = tensors[name].flip(0).contiguous()
        tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
        tensors[f"{prefix}eh_proj.weight"] = torch.randn(hidden, 2 * hidden) / hidden**0.5
        for name in ("enorm", "hnorm", "shared_head.norm"):
            tensors[f"{prefix}{name}.weight"] = 1 + torch.randn(hidden) / 5
