"""Artifacts to load: the shipped example, and a random one for each family, wide enough for many ranks.

Another family is another entry of CONFIGS: every check takes its models from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from ascend_rig import models
from kimi_k25 import as_k25
from packed_v4 import RELEASE, write_random_release
from random_model import write_random
from safetensors.torch import load_file, save_file
from torch import nn

from npuq.convert import convert_checkpoint
from npuq.formats.static_w8a8 import InputScale, static_tensors

from .corruption import corrupt

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "tiny-deepseek-v3-fp8"
_WIDE = {
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "intermediate_size": 1024,
    "moe_intermediate_size": 1024,  # 16 ranks get 64 each, the least that the NPU's W4A8 matmul takes
    "n_routed_experts": 16,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 512,
    "num_nextn_predict_layers": 0,
    "architectures": ["DeepseekV3ForCausalLM"],
}
_INDEXER = {"index_n_heads": 16, "index_head_dim": 128, "index_topk": 2048}
_GLM_5 = (
    models.KIMI
    | _WIDE
    | _INDEXER
    | {
        "model_type": "glm_moe_dsa",
        "architectures": ["GlmMoeDsaForCausalLM"],
        "num_nextn_predict_layers": 1,
        "indexer_rope_interleave": True,
    }
)
CONFIGS: dict[str, dict[str, Any]] = {
    "v2-lite": models.V2_LITE | _WIDE | {"architectures": ["DeepseekV2ForCausalLM"]},
    "v3-mtp": models.KIMI | _WIDE | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1},
    "kimi": models.KIMI | _WIDE,
    "kimi-k2.5": models.KIMI | _WIDE,  # its text model
    # 20 heads, which 1, 2, 4 and 5 ranks share, and so do the other widths.
    "glm-flash": models.GLM_FLASH
    | _WIDE
    | {
        "num_attention_heads": 20,
        "num_key_value_heads": 20,
        "qk_nope_head_dim": 48,
        "v_head_dim": 64,
        "intermediate_size": 1280,
        "moe_intermediate_size": 1280,
        "n_routed_experts": 20,
        "vocab_size": 640,
        "num_nextn_predict_layers": 1,
        "architectures": ["Glm4MoeLiteForCausalLM"],
    },
    "v32": models.KIMI
    | _WIDE
    | _INDEXER
    | {
        "model_type": "deepseek_v32",
        "architectures": ["DeepseekV32ForCausalLM"],
        "num_nextn_predict_layers": 1,
    },
    # An indexer in every layer, as GLM-5 and 5.1 have; in 5.2 layers share selections.
    "glm-5": _GLM_5,
    "glm-5.2": _GLM_5
    | {
        "num_hidden_layers": 3,
        "indexer_types": ["full", "full", "shared"],
        "index_topk_freq": 4,
        "index_skip_topk_offset": 2,
    },
}
# Grouped-query attention: 4 key and value heads, which more ranks hold several times; GLM has a dense layer.
_GQA = {
    **{key: value for key, value in models.KIMI.items() if key not in ("q_lora_rank", *models.ATTENTION)},
    **{key: value for key, value in _WIDE.items() if key not in models.ATTENTION},
    "num_key_value_heads": 4,
    "head_dim": 16,
}
TABLES: dict[str, dict[str, Any]] = {
    "qwen3-moe": _GQA
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 16,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "glm-4.5": _GQA
    | {
        "model_type": "glm4_moe",
        "architectures": ["Glm4MoeForCausalLM"],
        "num_nextn_predict_layers": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
    },
}
CONFIGS |= TABLES
# No release has dense layers.
TABLES["qwen3-dense"] = TABLES["qwen3-moe"] | {"mlp_only_layers": [0]}
# As it is released: FP4 experts, and a layer of each ratio that engines have; one hashed. 4 groups of heads.
V4 = "deepseek-v4"
CONFIGS[V4] = RELEASE | {
    "hidden_size": 128,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_hash_layers": 1,
    "head_dim": 64,
    "o_groups": 4,
    "sliding_window": 128,
    "compress_ratios": [0, 4, 128, 0],
    "index_head_dim": 128,
    "vocab_size": 512,
}
# Every artifact, and those that have an MTP layer.
STATIC = "v3-static"
ARTIFACTS = ("example", *CONFIGS, STATIC, "qwen3-dense")
WITH_MTP = ("example", *(name for name, config in CONFIGS.items() if config["num_nextn_predict_layers"]))
# Published with a vision tower, a nested config and experts in int4; of the tower's heads 16 ranks get one each.
_VISION = {"kimi-k2.5": {"hidden_size": 128, "num_attention_heads": 16, "intermediate_size": 64}}
# Stored in FP8 blocks, as DeepSeek and Moonshot publish; the others in bfloat16.
_FP8 = {"kimi", "v32"}
_BLOCK = 32

# What ModelSlim's own recipes quantize statically, for the engines' fused preprocessing of attention; and an MLP.
_STATIC_LINEARS = (
    "q_a_proj",
    "kv_a_proj_with_mqa",
    "q_b_proj",
    "o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def placements(*names: str, ranks: Iterable[int] = (1, 2, 4, 8, 16)) -> list[tuple[str, int]]:
    """Each artifact with each of these numbers of ranks that can share its heads."""
    heads = {name: CONFIGS["v3-mtp" if name == STATIC else name]["num_attention_heads"] for name in names}
    return [(name, count) for name in names for count in ranks if heads[name] % count == 0]


def write_artifact(name: str, folder: Path) -> Path:
    """The artifact named `name` ("example", one of CONFIGS or STATIC, after "v3-mtp"), converted under `folder`."""
    if name == STATIC:
        return corrupt(folder / "v3-mtp", folder / name, _make_static)
    source = EXAMPLE if name == "example" else _write_source(name, folder / f"{name}-source")
    if name in _VISION:
        source = as_k25(source, folder / f"{name}-published", **_VISION[name])
    convert_checkpoint(source, folder / name, method="minmax", workers=1)
    return folder / name


def _make_static(tensors: dict[str, torch.Tensor], tags: dict[str, str]) -> None:
    """Turn dynamic linears into static ones of the same weights."""
    for name in [name for name, kind in tags.items() if kind == "W8A8_DYNAMIC" and name.endswith(".weight")]:
        prefix = name.removesuffix("weight")
        if not prefix.endswith(tuple(f"{linear}." for linear in _STATIC_LINEARS)):
            continue
        # Fused linears share their input's range; others have ranges of their own.
        inputs = InputScale.of_range(-4.0, 6.0 if "_a_proj" in name or "mlp" in name else 5.0)
        made = static_tensors(tensors[name], tensors[f"{prefix}weight_scale"], inputs)
        tensors |= {prefix + suffix: tensor for suffix, tensor in made.items()}
        tags |= {prefix + suffix: "W8A8" for suffix in made}


def _write_source(name: str, directory: Path) -> Path:
    if name == V4:
        write_random_release(directory, CONFIGS[V4])
        return directory
    if name in TABLES:
        return write_random(directory, TABLES[name])
    config = CONFIGS[name]
    layers, extra = config["num_hidden_layers"], config["num_nextn_predict_layers"]
    # An MTP layer is a decoder layer with its embedding, head and projection beside it.
    models.write_checkpoint(directory, config | {"num_hidden_layers": layers + extra})
    (directory / "config.json").write_text(json.dumps(config))
    if extra:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        hidden = config["hidden_size"]
        for layer in range(layers, layers + extra):
            prefix = f"model.layers.{layer}"
            tensors |= {
                f"{prefix}.embed_tokens.weight": tensors["model.embed_tokens.weight"].clone(),
                f"{prefix}.shared_head.head.weight": tensors["lm_head.weight"].clone(),
                f"{prefix}.shared_head.norm.weight": torch.rand(hidden).bfloat16(),
                f"{prefix}.enorm.weight": torch.rand(hidden).bfloat16(),
                f"{prefix}.hnorm.weight": torch.rand(hidden).bfloat16(),
                f"{prefix}.eh_proj.weight": torch.rand(hidden, 2 * hidden).bfloat16(),
            }
        save_file(tensors, file, metadata={"format": "pt"})
    if "index_topk" in config:
        _add_indexers(directory / "model.safetensors", config)
    if name in _FP8:
        _store_in_fp8(directory)
    return directory


def _add_indexers(file: Path, config: dict[str, Any]) -> None:
    """The indexer of every layer that selects tokens by itself. V3.2 keeps its layer norm in float32."""
    layers = range(config["num_hidden_layers"] + config["num_nextn_predict_layers"])
    types = dict(enumerate(config.get("indexer_types", ())))
    heads, width, tensors = config["index_n_heads"], config["index_head_dim"], load_file(file)
    kept = torch.float32 if config["model_type"] == "deepseek_v32" else torch.bfloat16
    for layer in (layer for layer in layers if types.get(layer) != "shared"):
        prefix = f"model.layers.{layer}.self_attn.indexer"
        tensors |= {
            f"{prefix}.wq_b.weight": torch.randn(heads * width, config["q_lora_rank"]).bfloat16(),
            f"{prefix}.wk.weight": torch.randn(width, config["hidden_size"]).bfloat16(),
            f"{prefix}.weights_proj.weight": torch.randn(heads, config["hidden_size"]).bfloat16(),
            f"{prefix}.k_norm.weight": torch.rand(width).to(kept),
            f"{prefix}.k_norm.bias": torch.rand(width).to(kept),
        }
    save_file(tensors, file, metadata={"format": "pt"})


def _store_in_fp8(directory: Path) -> None:
    """Every projection of a bf16 checkpoint in float8_e4m3fn, with a float32 scale for each block of it."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if any(part in name for part in ("_proj", "wq_b", "indexer.wk"))]:
        if "weights_proj" in name:
            continue
        rows, columns = tensors[name].shape
        padded = nn.functional.pad(tensors[name].float(), (0, -columns % _BLOCK, 0, -rows % _BLOCK))
        blocks = padded.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
        scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        codes = (blocks / scale).flatten(2, 3).flatten(0, 1)[:rows, :columns]
        tensors[name] = codes.contiguous().to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [_BLOCK, _BLOCK]}
    (directory / "config.json").write_text(json.dumps(config))
