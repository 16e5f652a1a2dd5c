"""Tiny random checkpoints of Kimi-K2.5 and Kimi-K2-Thinking, as their authors publish them: routed experts in packed
int4 with a scale for 32 inputs, everything else in the model's dtype, a vision tower beside the text model.

`write_k25` and `write_k2_thinking` return transformers' model of the same values. `as_k25` makes Kimi-K2.5 of any
checkpoint of DeepSeek-V3's shape, such as the shipped one, whose weights are trained and which has a tokenizer. The
packing is written here by hand; `tests/foreign/test_grouped_int4.py` compares it with compressed-tensors' own.
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


def write_k25(directory: Path, dtype: torch.dtype = torch.float32, *, outliers: bool = False, **text: Any) -> Any:
    """Write Kimi-K2.5 with changes to its text_config; `outliers`: some channels of the norms' gains are large."""
    import transformers

    config = transformers.Kimi_K25Config(
        text_config={"model_type": "deepseek_v3", **TEXT, **text},
        vision_config=VISION,
        projection_hidden_size=VISION["hidden_size"],
        tie_word_embeddings=False,
    )
    model = _random(transformers.Kimi_K25ForConditionalGeneration(config), dtype, outliers)

    def publish(saved: dict[str, Any]) -> None:
        saved["architectures"] = ["KimiK25ForConditionalGeneration"]
        saved["quantization_config"] = QUANTIZATION
        saved["text_config"] |= {
            "model_type": "kimi_k2",
            "architectures": ["DeepseekV3ForCausalLM"],
            "topk_method": "noaux_tc",
            "quantization_config": QUANTIZATION,
        }

    return _write(directory, model, dtype, publish)


def write_k2_thinking(
    directory: Path, dtype: torch.dtype = torch.float32, *, outliers: bool = False, **changes: Any
) -> Any:
    """Write Kimi-K2-Thinking: the same text model, flat."""
    import transformers

    config = transformers.DeepseekV3Config(**(TEXT | changes))
    model = _random(transformers.DeepseekV3ForCausalLM(config), dtype, outliers)

    def publish(saved: dict[str, Any]) -> None:
        saved |= {"model_type": "kimi_k2", "topk_method": "noaux_tc", "quantization_config": QUANTIZATION}

    return _write(directory, model, dtype, publish)


def as_k25(deepseek: Path, directory: Path, **vision: int) -> Path:
    """Write a small checkpoint of DeepSeek-V3, in FP8 or not, as Kimi-K2.5: without MTP layers, in several shards.

    `vision`: changes to the vision tower's sizes.
    """
    config = json.loads((deepseek / "config.json").read_text())
    stored: dict[str, Tensor] = {}
    for shard in sorted(deepseek.glob("*.safetensors")):
        stored |= load_file(shard)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv") or name.startswith(f"model.layers.{config['num_hidden_layers']}."):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            tensor = (tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
        if ".mlp.experts." in name:
            tensors |= _stored(f"language_model.{name}", *packed(tensor))
        else:
            tensors[f"language_model.{name}"] = tensor
    sizes = VISION | vision
    generator = torch.Generator().manual_seed(SEED)
    for name, shape in _vision_shapes(sizes, config["hidden_size"]).items():
        tensors[name] = torch.randn(shape, generator=generator).bfloat16()
    config.pop("quantization_config", None)
    text = config | {"model_type": "kimi_k2", "num_nextn_predict_layers": 0, "quantization_config": QUANTIZATION}
    nested = {
        "model_type": "kimi_k25",
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": text,
        "vision_config": sizes | _published_sizes(sizes, config["hidden_size"]),
        "tie_word_embeddings": False,
    }
    directory.mkdir(parents=True)
    for path in deepseek.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, directory)
    (directory / "config.json").write_text(json.dumps(nested, indent=1))
    placed, names = {}, list(tensors)
    for number in range(3):
        part = names[number * len(names) // 3 : (number + 1) * len(names) // 3]
        shard = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in part}, directory / shard, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return directory


def _vision_shapes(sizes: dict[str, int], text: int) -> dict[str, tuple[int, ...]]:
    """The tensors of the vision tower and of the projector to `text` channels, by their published names."""
    hidden, mlp, patch, merged = sizes["hidden_size"], sizes["intermediate_size"], sizes["patch_size"], 4
    biased: dict[str, tuple[int, ...]] = {
        "vision_tower.patch_embed.proj": (hidden, 3, patch, patch),
        "vision_tower.encoder.final_layernorm": (hidden,),
        "mm_projector.pre_norm": (hidden,),
        "mm_projector.proj.0": (merged * hidden, merged * hidden),
        "mm_projector.proj.2": (text, merged * hidden),
    }
    for layer in range(sizes["num_hidden_layers"]):
        biased |= {
            f"vision_tower.encoder.blocks.{layer}.{name}": shape
            for name, shape in {
                "norm0": (hidden,),
                "norm1": (hidden,),
                "wqkv": (3 * hidden, hidden),
                "wo": (hidden, hidden),
                "mlp.fc0": (mlp, hidden),
                "mlp.fc1": (hidden, mlp),
            }.items()
        }
    shapes = {f"{name}.weight": shape for name, shape in biased.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in biased.items()}
    return shapes | {
        "vision_tower.patch_embed.pos_emb.weight": (sizes["pos_emb_height"], sizes["pos_emb_width"], hidden)
    }


def _published_sizes(sizes: dict[str, int], text: int) -> dict[str, Any]:
    """The keys of the published vision_config, which engines read; those of VISION are transformers'."""
    return {
        "init_pos_emb_height": sizes["pos_emb_height"],
        "init_pos_emb_width": sizes["pos_emb_width"],
        "mm_hidden_size": sizes["hidden_size"],
        "text_hidden_size": text,
        **{f"vt_{key}": sizes[key] for key in ("hidden_size", "intermediate_size")},
        **{f"vt_{key}": sizes[key] for key in ("num_attention_heads", "num_hidden_layers")},
    }


def _stored(name: str, words: Tensor, scale: Tensor) -> dict[str, Tensor]:
    shape = torch.tensor([words.shape[0], 8 * words.shape[1]], dtype=torch.int32)
    return {f"{name}_packed": words, f"{name}_scale": scale, f"{name}_shape": shape}


def _random(model: Any, dtype: torch.dtype, outliers: bool) -> Any:
    """Fill a model with random weights of a dtype, kept in float32: wide enough that every part moves the logits, and
    norms away from one."""
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.dim() == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
            if outliers and name.endswith("layernorm.weight"):
                parameter[::16] *= 8.0
            parameter.copy_(parameter.to(dtype))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(0.0, 0.2)
    return model.float().eval()


def _published(name: str) -> str:
    """The published name of a tensor: transformers 5.24 reads those, and does not restore all of them on saving."""
    return name.replace("language_model.model.blocks.", "language_model.model.layers.").removeprefix(
        "model." if name.startswith("model.mm_projector.") else ""
    )


def _write(directory: Path, model: Any, dtype: torch.dtype, publish: Any) -> Any:
    """Save a model with its experts packed; returns it in float32 with the values that the packed experts have."""
    plain = directory.parent / f"{directory.name}-values"
    model.save_pretrained(plain)
    tensors = {_published(name): weight for name, weight in load_file(plain / "model.safetensors").items()}
    stored = {}
    for name, weight in tensors.items():
        if ".mlp.experts." not in name:
            stored[name] = weight if name.endswith("e_score_correction_bias") else weight.to(dtype)
            continue
        words, scale = packed(weight)
        stored |= _stored(name, words, scale)
        tensors[name] = values(words, scale)
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    golden, report = type(model).from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    directory.mkdir(parents=True)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((plain / "config.json").read_text())
    saved["dtype"] = str(dtype).removeprefix("torch.")
    publish(saved)
    (directory / "config.json").write_text(json.dumps(saved, indent=1))
    shutil.rmtree(plain)
    return golden.eval()
