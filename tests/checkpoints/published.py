"""Releases at their published shapes: config.json, and checkpoints whose data are holes, a few MB on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kimi_k25_full
from holes import Header, write_holes

from npuq.models.config import ModelConfig
from npuq.models.family import Block
from npuq.models.tensors import Spec, expected_specs

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0},
    "torch_dtype": "bfloat16",
    **FP8,
}
V32 = V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
GLM_52: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "head_dim": 192,
    "qk_head_dim": 256,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 2048,
    "index_topk_freq": 4,
    "index_skip_topk_offset": 3,
    "index_topk_pattern": None,
    "index_share_for_mtp_iteration": True,
    "indexer_rope_interleave": True,
    "indexer_types": ["full" if layer < 3 or layer % 4 == 2 else "shared" for layer in range(78)],
    "rope_interleave": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 8000000},
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 154880,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1048576,
    "eos_token_id": [154820, 154827, 154829],
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    **FP8,
}
# As published: without scoring_func, and theta among rope's parameters.
GLM_47_FLASH: dict[str, Any] = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "hidden_size": 2048,
    "intermediate_size": 10240,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 47,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "rope_interleave": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "vocab_size": 154880,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 202752,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
MOONLIGHT: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 11264,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 50000,
    "rope_scaling": None,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.446,
    "vocab_size": 163840,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
V2_LITE: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.0,
    "vocab_size": 102400,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "torch_dtype": "bfloat16",
}
KIMI_K2: dict[str, Any] = V3 | {
    "model_type": "kimi_k2",
    "num_nextn_predict_layers": 0,
    "num_attention_heads": 64,
    "n_routed_experts": 384,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    "max_position_embeddings": 131072,
    "rope_theta": 50000.0,
    "rope_scaling": {"type": "yarn", "factor": 32, "original_max_position_embeddings": 4096, "mscale": 1.0},
}
QWEN3_30B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attention_bias": False,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "sliding_window": None,
    "use_sliding_window": False,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
QWEN3_235B = QWEN3_30B | {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 94,
    "max_window_layers": 94,
    "num_attention_heads": 64,
}
QWEN3_CODER_480B = QWEN3_30B | {
    "hidden_size": 6144,
    "intermediate_size": 8192,
    "moe_intermediate_size": 2560,
    "num_hidden_layers": 62,
    "max_window_layers": 62,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "num_experts": 160,
    "max_position_embeddings": 262144,
    "rope_theta": 10000000.0,
    "qkv_bias": False,
    "shared_expert_intermediate_size": 0,
    "use_qk_norm": True,
}
GLM_45: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 92,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "n_routed_experts": 160,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 151552,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "eos_token_id": [151329, 151336, 151338],
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
GLM_45_AIR = GLM_45 | {
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "use_qk_norm": False,
    "n_routed_experts": 128,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.0,
}
V4_FLASH: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "hidden_size": 4096,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 43,
    "num_nextn_predict_layers": 1,
    "num_hash_layers": 3,
    "num_attention_heads": 64,
    "num_key_value_heads": 1,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "sliding_window": 128,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "hidden_act": "silu",
    "swiglu_limit": 10.0,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "topk_method": "noaux_tc",
    "scoring_func": "sqrtsoftplus",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "vocab_size": 129280,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 1048576,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "expert_dtype": "fp4",
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "scale_fmt": "ue8m0",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    },
}
# With DSpark, a draft of three layers.
V4_FLASH_0731 = V4_FLASH | {
    "num_nextn_predict_layers": 3,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_target_layer_ids": [40, 41, 42],
    "dspark_markov_rank": 256,
    "dspark_noise_token_id": 128799,
}
V4_PRO = V4_FLASH | {
    "hidden_size": 7168,
    "moe_intermediate_size": 3072,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
    "index_topk": 1024,
    "n_routed_experts": 384,
    "routed_scaling_factor": 2.5,
}
RELEASES: dict[str, dict[str, Any]] = {
    "DeepSeek-V2-Lite": V2_LITE,
    "Moonlight-16B-A3B": MOONLIGHT,
    "GLM-4.7-Flash": GLM_47_FLASH,
    "DeepSeek-V3": V3,
    "DeepSeek-R1": V3,
    "DeepSeek-V3.2": V32,
    "GLM-5.2-FP8": GLM_52,
    "Kimi-K2": KIMI_K2,
    "Kimi-K2.5": kimi_k25_full.CONFIG,
    "Qwen3-30B-A3B": QWEN3_30B,
    "Qwen3-235B-A22B": QWEN3_235B,
    "Qwen3-Coder-480B-A35B": QWEN3_CODER_480B,
    "GLM-4.5": GLM_45,
    "GLM-4.5-Air": GLM_45_AIR,
    "DeepSeek-V4-Flash": V4_FLASH,
    "DeepSeek-V4-Flash-0731": V4_FLASH_0731,
    "DeepSeek-V4-Pro": V4_PRO,
}
# Those that npuq's runtime runs on NPUs and divides among ranks.
RUN_ON_NPUS = {name: config for name, config in RELEASES.items() if config["model_type"] != "deepseek_v4"}


def write_release(directory: Path, config: dict[str, Any]) -> list[Header]:
    """Write the checkpoint of a release as it is stored; returns its tensors."""
    tensors = list(_tensors(config))
    write_holes(directory, config, tensors)
    return tensors


def _tensors(config: dict[str, Any]) -> Iterator[Header]:
    if config is kimi_k25_full.CONFIG:
        yield from kimi_k25_full.headers()
        return
    model = ModelConfig.from_dict(config)
    if config["model_type"] == "deepseek_v4":
        yield from _v4_tensors(model)
        return
    # GLM-5's releases leave out what their MTP layer shares with the model.
    shared = config["model_type"] == "glm_moe_dsa"
    mtp = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    for name, spec in expected_specs(model, mtp).items():
        if shared and spec.optional:
            continue
        if "quantization_config" in config and _is_fp8(spec):
            yield name, "F8_E4M3", spec.shape
            yield f"{name}_scale_inv", "F32", (-(-spec.shape[0] // 128), -(-spec.shape[1] // 128))
        else:
            yield name, spec.kept_dtype or "BF16", spec.shape


def _v4_tensors(model: ModelConfig) -> Iterator[Header]:
    """FP4 experts, FP8 linears, powers of two beside them; without copies of embedding and head."""
    drafts = range(model.num_hidden_layers, model.num_hidden_layers + model.num_nextn_predict_layers)
    fp8 = ("q_a", "q_b", "kv", "o_a", "o_b", "index_q", "e_proj", "h_proj", "main_proj")
    for name, spec in expected_specs(model, drafts).items():
        if spec.optional or spec.entry is None:
            continue
        scale = name.removesuffix("weight") + "scale"
        if spec.block is Block.EXPERT:
            rows, columns = spec.shape
            yield name, "I8", (rows, columns // 2)
            yield scale, "F8_E8M0", (rows, columns // 32)
        elif spec.block is Block.SHARED or spec.entry.part in fp8:
            yield name, "F8_E4M3", spec.shape
            yield scale, "F8_E8M0", (-(-spec.shape[0] // 128), -(-spec.shape[1] // 128))
        else:
            yield name, spec.kept_dtype or "BF16", spec.shape


def _is_fp8(spec: Spec) -> bool:
    """True for the weights that DeepSeek's FP8 releases store in FP8."""
    inside = (Block.ATTENTION, Block.DENSE, Block.SHARED, Block.EXPERT)
    return spec.block in inside and len(spec.shape) == 2 and not spec.name.endswith("weights_proj.weight")
