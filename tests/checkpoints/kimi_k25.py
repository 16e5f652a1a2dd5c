"""Tiny random checkpoints of Kimi-K2.5 and Kimi-K2-Thinking, as their authors publish them: routed experts in packed
int4 with a scale for 32 inputs, everything else in the model's dtype, a vision tower beside the text model.

`write_k25` and `write_k2_thinking` return transformers' model of the same values. The packing is written here by hand;
`tests/foreign/test_grouped_int4.py` compares it with compressed-tensors' own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32
SEED = 20260127
# What the authors publish as `quantization_config`.
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "kv_cache_scheme": None,
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": GROUP,
                "num_bits": 4,
                "observer": "minmax",
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
}
TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 48,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "max_position_embeddings": 256,
    # transformers' latent norms have a fixed epsilon of 1e-6.
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 50000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "patch_size": 4,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize float [N, K] symmetrically by groups: int32 [N, K / 8] and bfloat16 [N, K / 32]."""
    groups = weight.float().unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(2) / 7).clamp(min=2.0**-100).bfloat16()
    codes = (groups / scale[:, :, None].float()).round().clamp(-8, 7).flatten(1)
    return pack(codes), scale


def pack(codes: Tensor) -> Tensor:
    """Pack codes [N, K] in −8 to 7 to int32 [N, K / 8], the first of eight in the lowest bits."""
    words = ((codes.to(torch.int64) + 8).unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def values(words: Tensor, scale: Tensor) -> Tensor:
    """The float32 [N, K] that packed codes stand for."""
    codes = ((words[:, :, None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15) - 8).flatten(1)
    return codes.float() * scale.float().repeat_interleave(GROUP, dim=1)


def write_k25(directory: Path, dtype: torch.dtype = torch.float32, **text: Any) -> Any:
    """Write Kimi-K2.5 with changes to its text_config."""
    import transformers

    config = transformers.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **TEXT, **text},
        vision_config=VISION,
        projection_hidden_size=VISION["hidden_size"],
        tie_word_embeddings=False,
    )
    model = _random(transformers.Kimi_K25ForConditionalGeneration(config), dtype)

    def publish(saved: dict[str, Any]) -> None:
        saved["architectures"] = ["KimiK25ForConditionalGeneration"]
        saved["quantization_config"] = QUANTIZATION
        saved["text_config"] |= {
            "model_type": "kimi_k2",
            "architectures": ["DeepseekV3ForCausalLM"],
            "topk_method": "noaux_tc",
            "quantization_config": QUANTIZATION,
        }

    return _write(directory, model, publish)


def write_k2_thinking(directory: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write Kimi-K2-Thinking: the same text model, flat."""
    import transformers

    config = transformers.DeepseekV3Config(**(TEXT | changes))
    model = _random(transformers.DeepseekV3ForCausalLM(config), dtype)

    def publish(saved: dict[str, Any]) -> None:
        saved |= {"model_type": "kimi_k2", "topk_method": "noaux_tc", "quantization_config": QUANTIZATION}

    return _write(directory, model, publish)


def _random(model: Any, dtype: torch.dtype) -> Any:
    """Fill a model with random weights, wide enough that every part moves the logits, and norms away from one."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model.to(dtype).eval()


def _published(name: str) -> str:
    """The published name of a tensor: transformers 5.24 reads those, and does not restore all of them on saving."""
    return name.replace("language_model.model.blocks.", "language_model.model.layers.").removeprefix(
        "model." if name.startswith("model.mm_projector.") else ""
    )


def _write(directory: Path, model: Any, publish: Any) -> Any:
    """Save a model with its experts packed; returns it with the values that the packed experts have."""
    plain = directory.parent / f"{directory.name}-values"
    model.save_pretrained(plain)
    tensors = {_published(name): weight for name, weight in load_file(plain / "model.safetensors").items()}
    stored = {}
    for name, weight in tensors.items():
        if ".mlp.experts." not in name:
            stored[name] = weight
            continue
        words, scale = packed(weight)
        shape = torch.tensor(weight.shape, dtype=torch.int32)
        stored |= {f"{name}_packed": words, f"{name}_scale": scale, f"{name}_shape": shape}
        tensors[name] = values(words, scale).to(weight.dtype)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    golden, report = type(model).from_pretrained(plain, dtype=model.dtype, output_loading_info=True)
    assert not any(report.values()), report
    directory.mkdir(parents=True)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((plain / "config.json").read_text())
    publish(saved)
    (directory / "config.json").write_text(json.dumps(saved, indent=1))
    shutil.rmtree(plain)
    return golden.eval()
