"""Random W4A8 artifacts of any shape, for benchmarks: the files of `npuq convert`, without a source."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from npuq.formats.artifact import DESCRIPTION_NAME, FORMAT_VERSION, MANIFEST_NAME, ROPE_NAME, description
from npuq.formats.checkpoint import SINGLE_NAME
from npuq.formats.rope_file import save_rope
from npuq.formats.safetensors import encode_header
from npuq.formats.schemes import Scheme, output_tensors
from npuq.models.config import ModelConfig
from npuq.models.roles import Role
from npuq.models.rope import rope_tables
from npuq.models.tensors import ModelTensors

# DeepSeek-V3 in the size of a laptop: 2.6 GB, of which a decoded token reads about 0.6 GB.
SMALL_V3: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "vocab_size": 32768,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}

# Qwen3-30B-A3B's layers, fewer of them, and a smaller vocabulary: 2.2 GB, of which a decoded token reads 0.3 GB.
SMALL_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 32768,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 65536,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
}

SHAPES: dict[str, dict[str, Any]] = {"v3": SMALL_V3, "qwen3": SMALL_QWEN3}
"""Models by the names of `peers/gguf_shapes.py`, which has the same in llama.cpp's words."""

_POOL_BYTES = 64 << 20
_SCHEMES = {
    Role.ATTENTION: Scheme.W8A8,
    Role.DENSE_MLP: Scheme.W8A8,
    Role.SHARED_EXPERT: Scheme.W8A8,
    Role.ROUTED_EXPERT: Scheme.W4A8,
}


def linears(config: ModelConfig) -> Iterator[tuple[str, Scheme, tuple[int, ...]]]:
    """Weights of a model that the runtime reads: name, scheme and logical shape of each."""
    for spec in ModelTensors(config).unroll(()):
        yield spec.name, _SCHEMES.get(spec.role, Scheme.FLOAT), spec.shape


def make(directory: Path, settings: dict[str, Any]) -> None:
    """Write the artifact. Codes are uniform; scales keep the size of activations from layer to layer."""
    config = ModelConfig.from_dict(settings)
    torch.manual_seed(0)
    pool = torch.randint(-128, 128, (_POOL_BYTES,), dtype=torch.int8)
    entries: list[tuple[str, str, tuple[int, ...], Scheme, int]] = []  # …, scheme, fan-in
    for name, scheme, shape in linears(config):
        if scheme is Scheme.FLOAT:
            code = "F32" if name.endswith("bias") else "BF16"
            entries.append((name, code, shape, scheme, shape[-1]))
        else:
            parts = output_tensors(name, scheme, shape, row_parallel="down_proj" in name)
            entries += [(part.name, part.dtype, part.shape, scheme, shape[-1]) for part in parts]
    (directory / MANIFEST_NAME).parent.mkdir(parents=True, exist_ok=True)
    with (directory / SINGLE_NAME).open("wb") as file:
        file.write(encode_header([(name, code, shape) for name, code, shape, _, _ in entries]))
        for position, (name, code, shape, scheme, fan_in) in enumerate(entries):
            tensor = _draw(pool, position, name, code, shape, scheme, fan_in)
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)
    types = {name: scheme for name, _, _, scheme, _ in entries}
    (directory / "config.json").write_text(json.dumps(settings, indent=2))
    (directory / DESCRIPTION_NAME).write_text(json.dumps(description(types)))
    save_rope(rope_tables(config), directory / ROPE_NAME)
    (directory / MANIFEST_NAME).write_text(json.dumps({"format_version": FORMAT_VERSION}))


def _draw(
    pool: Tensor, position: int, name: str, code: str, shape: tuple[int, ...], scheme: Scheme, fan_in: int
) -> Tensor:
    if code == "I8":
        return _repeat(pool, position, shape)
    if name.endswith("weight_scale"):
        # A uniform code of b bits has a standard deviation of 2^b / √12.
        return torch.full(shape, fan_in**-0.5 * 12**0.5 / 2**scheme.weight_bits)
    if scheme is not Scheme.FLOAT or name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name:
        return torch.ones(shape, dtype=torch.bfloat16)
    return (_repeat(pool, position, shape).float() * (fan_in**-0.5 / 74)).bfloat16()


def _repeat(pool: Tensor, position: int, shape: tuple[int, ...]) -> Tensor:
    """Random bytes from another place of the pool for each tensor."""
    size = torch.Size(shape).numel()
    start = position * 7919 % (len(pool) // 2)
    copies = -(-size // (len(pool) - start))
    return pool[start:].repeat(copies)[:size].view(shape)
