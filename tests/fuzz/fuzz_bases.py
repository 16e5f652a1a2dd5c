"""Small artifacts to damage: every scheme, both attention shapes, odd sizes; 0.1 to 0.4 MB each."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from npuq.convert import convert_checkpoint
from npuq.formats.artifact import DESCRIPTION_NAME, KV_CACHE_NAME
from npuq.formats.kv_cache import save_scales, storable_scale
from npuq.formats.schemes import SCALE, SUFFIXES, WEIGHT
from npuq.formats.static_w8a8 import InputScale, static_tensors
from npuq.models.config import ModelConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from measure.random_artifact import linears

V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 96,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 32},
    "torch_dtype": "bfloat16",
    "eos_token_id": 1,
}
_ODD = {
    "hidden_size": 50,
    "intermediate_size": 38,
    "moe_intermediate_size": 48,
    "num_attention_heads": 3,
    "q_lora_rank": 33,
    "kv_lora_rank": 48,
    "qk_nope_head_dim": 7,
    "v_head_dim": 10,
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "n_group": 3,
    "topk_group": 2,
    "vocab_size": 101,
    "max_position_embeddings": 90,
    "rope_scaling": {"type": "dynamic", "factor": 1.5},
}
_LITE = {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
    "rope_scaling": None,
}
# Grouped-query attention, with everything that its table has.
GLM = {
    "model_type": "glm4_moe",
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "attention_bias": True,
    "use_qk_norm": True,
    "vocab_size": 96,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}


def make_bases(folder: Path) -> list[Path]:
    """Write all of them below an empty folder."""
    sources = {
        "v3": write_checkpoint(folder / "source", V3),
        "odd": write_checkpoint(folder / "source-odd", {**V3, **_ODD}),
        "lite": write_checkpoint(folder / "source-lite", {**V3, **_LITE}),
        "glm": write_checkpoint(folder / "source-glm", GLM),
    }
    made = [sources["v3"]]
    for name, recipe in (("v3", "w4a8"), ("odd", "w4a8"), ("lite", "w8a8"), ("v3", "float"), ("glm", "w4a8")):
        output = folder / f"{name}-{recipe}"
        convert_checkpoint(sources[name], output, recipe=recipe, method="minmax", workers=1, max_shard_size=80_000)
        made.append(output)
    _add_cache_scales(folder / "v3-w4a8", layers=2, channels=32)
    static = folder / "v3-static"
    convert_checkpoint(sources["v3"], static, method="minmax", workers=1)
    for layer in range(2):
        attention = f"model.layers.{layer}.self_attn"
        _make_static(static, [f"{attention}.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")])
    return [*made, static]


def write_checkpoint(directory: Path, settings: Mapping[str, Any]) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, _, shape in linears(ModelConfig.from_dict(settings)):
        tensor = 1 + 0.1 * torch.randn(shape, generator=generator)
        if len(shape) == 2:
            tensor = torch.randn(shape, generator=generator) * shape[1] ** -0.5
        tensors[name] = tensor.to(torch.float32 if name.endswith("bias") else torch.bfloat16)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(settings))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2]}))
    return directory


def _add_cache_scales(directory: Path, layers: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scales = [storable_scale(0.02 + 0.1 * torch.rand(channels, generator=generator)) for _ in range(layers)]
    save_scales(scales, directory / KV_CACHE_NAME)


def _make_static(directory: Path, prefixes: list[str]) -> None:
    """Give W8A8_DYNAMIC linears a static input scale."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    description = json.loads((directory / DESCRIPTION_NAME).read_text())
    for prefix in prefixes:
        shard = directory / index[f"{prefix}.{WEIGHT}"]
        tensors = load_file(shard)
        codes, scale = tensors[f"{prefix}.{WEIGHT}"], tensors[f"{prefix}.{SCALE}"]
        static = static_tensors(codes, scale, InputScale.of_range(-4.0, 4.0))
        tensors |= {f"{prefix}.{suffix}": tensor for suffix, tensor in static.items()}
        save_file(tensors, shard)
        description |= {f"{prefix}.{suffix}": "W8A8" for suffix in static}
        index |= {f"{prefix}.{suffix}": shard.name for suffix in SUFFIXES if f"{prefix}.{suffix}" in tensors}
    (directory / DESCRIPTION_NAME).write_text(json.dumps(description))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
