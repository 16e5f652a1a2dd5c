"""A dry run of a checkpoint of DeepSeek-V3's size, from headers alone: its data are holes."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest

from npuq.convert import convert_checkpoint
from npuq.quant.safetensors import encode_header

V3: dict[str, Any] = {
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
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, model_shapes) -> Path:
    """671 billion parameters in 163 shards whose data are holes: a few MB on disk."""
    directory = tmp_path_factory.mktemp("full") / "source"
    directory.mkdir()
    tensors = []
    for name, shape in model_shapes(V3).items():
        if "_proj" in name and "eh_proj" not in name:
            blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
            tensors += [(name, "F8_E4M3", shape), (name + "_scale_inv", "F32", blocks)]
        else:
            tensors.append((name, "F32" if name.endswith("bias") else "BF16", shape))
    assert len(tensors) > 91_000
    placed, per_shard = {}, -(-len(tensors) // 163)
    for number in range(163):
        part = tensors[number * per_shard : (number + 1) * per_shard]
        shard = f"model-{number + 1:05d}-of-000163.safetensors"
        header = encode_header(part)
        with (directory / shard).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(prod(shape) * BYTES[dtype] for _, dtype, shape in part))
        placed |= {name: shard for name, _, _ in part}
    (directory / "config.json").write_text(json.dumps(V3))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return directory


def test_what_91000_tensors_become(full_size, tmp_path):
    summary = convert_checkpoint(full_size, tmp_path / "out", dry_run=True)
    assert summary.jobs > 46_000 and summary.tensors > 180_000
    # Routed experts: 58 layers of 256 × 3 matrices of 7168 × 2048 in four bits, and their float32 columns.
    experts = next(role for role in summary.roles if role["role"] == "routed_expert")
    assert experts["tensors"] == 58 * 256 * 3
    columns = 2 * 2048 * 3 + 7168 * 18
    assert experts["output_bytes"] == 58 * 256 * (3 * 7168 * 2048 // 2 + 4 * columns)
    assert not (tmp_path / "out").exists()


def test_the_memory_that_is_told(full_size, rig, tmp_path):
    answer = rig(full_size, tmp_path / "out", options={"dry_run": True})
    assert 0.7 < answer["memory"] / answer["summary"]["plan_bytes"] < 1.3


def test_the_command_prints_what_is_needed(full_size, tmp_path, npuq):
    outcome = npuq("convert", full_size, tmp_path / "out", "--dry-run", "--max-memory", "200MB")
    assert outcome.status == 0 and outcome.stderr == ""
    for words in ("routed_expert", "46183 jobs", "689 GB → 371 GB", "236 MB for the plan", "disk: 371 GB needed"):
        assert words in outcome.stdout, words
