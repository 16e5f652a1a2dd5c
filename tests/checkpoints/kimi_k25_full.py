"""Kimi-K2.5 at its published shapes: 208,550 tensors in 64 shards whose data are holes, a few MB on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from holes import Header, write_holes
from kimi_k25 import QUANTIZATION

SHARDS = 64
HIDDEN, HEADS, MOE, LAYERS, EXPERTS, VISION = 7168, 64, 2048, 61, 384, 1152
TEXT: dict[str, Any] = {
    "model_type": "kimi_k2",
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": 18432,
    "moe_intermediate_size": MOE,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 0,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 262144,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 64.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "quantization_config": QUANTIZATION,
}
CONFIG: dict[str, Any] = {
    "model_type": "kimi_k25",
    "architectures": ["KimiK25ForConditionalGeneration"],
    "dtype": "bfloat16",
    "media_placeholder_token_id": 163605,
    "text_config": TEXT,
    "vision_config": {"vt_hidden_size": VISION, "vt_num_hidden_layers": 27, "text_hidden_size": HIDDEN},
}


def headers(experts: int = EXPERTS) -> Iterator[Header]:
    """Name, dtype and shape of every tensor, with fewer experts a layer if wanted."""
    text = "language_model.model."
    yield f"{text}embed_tokens.weight", "BF16", (TEXT["vocab_size"], HIDDEN)
    yield f"{text}norm.weight", "BF16", (HIDDEN,)
    yield "language_model.lm_head.weight", "BF16", (TEXT["vocab_size"], HIDDEN)
    for layer in range(LAYERS):
        yield from _layer(f"{text}layers.{layer}.", experts if layer else 0)
    yield from _vision()


def _layer(prefix: str, experts: int) -> Iterator[Header]:
    attention = f"{prefix}self_attn."
    yield f"{prefix}input_layernorm.weight", "BF16", (HIDDEN,)
    yield f"{prefix}post_attention_layernorm.weight", "BF16", (HIDDEN,)
    yield f"{attention}q_a_proj.weight", "BF16", (1536, HIDDEN)
    yield f"{attention}q_a_layernorm.weight", "BF16", (1536,)
    yield f"{attention}q_b_proj.weight", "BF16", (HEADS * 192, 1536)
    yield f"{attention}kv_a_proj_with_mqa.weight", "BF16", (576, HIDDEN)
    yield f"{attention}kv_a_layernorm.weight", "BF16", (512,)
    yield f"{attention}kv_b_proj.weight", "BF16", (HEADS * 256, 512)
    yield f"{attention}o_proj.weight", "BF16", (HIDDEN, HEADS * 128)
    width, mlp = (MOE, f"{prefix}mlp.shared_experts.") if experts else (TEXT["intermediate_size"], f"{prefix}mlp.")
    for name, shape in _gated(width).items():
        yield f"{mlp}{name}.weight", "BF16", shape
    if experts:
        yield f"{prefix}mlp.gate.weight", "BF16", (experts, HIDDEN)
        yield f"{prefix}mlp.gate.e_score_correction_bias", "F32", (experts,)
    for expert in range(experts):
        for name, (rows, columns) in _gated(MOE).items():
            linear = f"{prefix}mlp.experts.{expert}.{name}.weight"
            yield f"{linear}_packed", "I32", (rows, columns // 8)
            yield f"{linear}_scale", "BF16", (rows, columns // 32)
            yield f"{linear}_shape", "I32", (2,)


def _gated(width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}


def _vision() -> Iterator[Header]:
    tower = "vision_tower."
    yield f"{tower}patch_embed.proj.weight", "BF16", (VISION, 3, 14, 14)
    yield f"{tower}patch_embed.proj.bias", "BF16", (VISION,)
    yield f"{tower}patch_embed.pos_emb.weight", "BF16", (64, 64, VISION)
    shapes: dict[str, tuple[int, ...]] = {
        "norm0": (VISION,),
        "norm1": (VISION,),
        "wqkv": (3 * VISION, VISION),
        "wo": (VISION, VISION),
        "mlp.fc0": (4304, VISION),
        "mlp.fc1": (VISION, 4304),
    }
    modules = {f"{tower}encoder.blocks.{block}.{name}": shape for block in range(27) for name, shape in shapes.items()}
    modules[f"{tower}encoder.final_layernorm"] = (VISION,)
    modules["mm_projector.pre_norm"] = (VISION,)
    modules["mm_projector.proj.0"] = (4 * VISION, 4 * VISION)
    modules["mm_projector.proj.2"] = (HIDDEN, 4 * VISION)
    for module, shape in modules.items():
        yield f"{module}.weight", "BF16", shape
        yield f"{module}.bias", "BF16", shape[:1]


def write_headers(directory: Path, experts: int = EXPERTS) -> Path:
    """Write the checkpoint, with fewer experts a layer if wanted."""
    config = CONFIG | {"text_config": TEXT | {"n_routed_experts": experts}}
    write_holes(directory, config, sorted(headers(experts)), SHARDS)
    return directory
