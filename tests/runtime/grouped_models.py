"""Tiny random models with grouped-query attention: transformers writes them, and its implementation is golden."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "convert"))

from calibrated import VOCABULARY, add_tokenizer

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_QWEN: dict[str, Any] = {
    **_COMMON,
    "num_experts": 8,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_GLM: dict[str, Any] = {
    **_COMMON,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}

# What families.md's oracle has to cover, several to a model.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3Moe", {**_QWEN, "mlp_only_layers": [1]}),
    # As many channels of all heads as of the stream; weights of experts that do not add up to 1; a sparse layer of two.
    "qwen3-step": (
        "Qwen3Moe",
        {**_QWEN, "head_dim": 12, "decoder_sparse_step": 2, "norm_topk_prob": False, "num_hidden_layers": 4},
    ),
    "glm": ("Glm4Moe", {**_GLM, "attention_bias": True, "use_qk_norm": True}),
    # Without biases and norms; each head has keys and values of its own.
    "glm-air": (
        "Glm4Moe",
        {**_GLM, "attention_bias": False, "use_qk_norm": False, "num_key_value_heads": 6, "norm_topk_prob": False},
    ),
}


def make_grouped(directory: Path, name: str, **changes: Any) -> Any:
    """Save a random float32 checkpoint; the transformers model that holds the same weights."""
    import transformers

    kind, settings = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    torch.manual_seed(5)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            # Wide enough that every part of the model moves the logits; norms away from one.
            if "norm" in key:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 0.3 if key.endswith("bias") else parameter.shape[-1] ** -0.5)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    add_tokenizer(directory)
    return model


def set_config(directory: Path, **changes: Any) -> None:
    """Change keys of a saved config.json."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
