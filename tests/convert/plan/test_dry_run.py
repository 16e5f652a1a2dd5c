"""Dry runs of checkpoints of published sizes, from headers alone: their data are holes."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest

from npuq.convert import convert_checkpoint
from npuq.errors import NpuqError
from npuq.formats.safetensors import encode_header

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
V32 = V3 | {"model_type": "deepseek_v32", "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
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
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
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
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, model_shapes, in_fp8) -> Path:
    """671 billion parameters in 163 shards whose data are holes: a few MB on disk."""
    directory = tmp_path_factory.mktemp("full") / "source"
    assert write_holes(directory, V3, model_shapes(V3), in_fp8) > 91_000
    return directory


def write_holes(
    directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], in_fp8: Callable[[str], bool]
) -> int:
    """A checkpoint without data, as the FP8 releases are stored; the number of its tensors."""
    directory.mkdir()
    tensors = []
    for name, shape in shapes.items():
        if in_fp8(name):
            blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
            tensors += [(name, "F8_E4M3", shape), (name + "_scale_inv", "F32", blocks)]
        else:
            tensors.append((name, "F32" if name.endswith("correction_bias") else "BF16", shape))
    placed, per_shard = {}, -(-len(tensors) // 163)
    for number in range(163):
        part = tensors[number * per_shard : (number + 1) * per_shard]
        shard = f"model-{number + 1:05d}-of-000163.safetensors"
        header = encode_header(part)
        with (directory / shard).open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(prod(shape) * BYTES[dtype] for _, dtype, shape in part))
        placed |= {name: shard for name, _, _ in part}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    return len(tensors)


def test_what_91000_tensors_become(full_size, tmp_path):
    summary = convert_checkpoint(full_size, tmp_path / "out", dry_run=True)
    assert summary.jobs > 46_000 and summary.tensors > 180_000
    # Routed experts: 58 layers of 256 × 3 matrices of 7168 × 2048 in four bits, and their float32 columns.
    experts = next(role for role in summary.roles if role["role"] == "routed_expert")
    assert experts["tensors"] == 58 * 256 * 3
    columns = 2 * 2048 * 3 + 7168 * 18
    assert experts["output_bytes"] == 58 * 256 * (3 * 7168 * 2048 // 2 + 4 * columns)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("config", "names", "indexers"), [(V32, 92_000, 62), (GLM_52, 118_629, 22)], ids=["v3.2", "glm-5.2"]
)
def test_sparse_models_of_published_sizes(config, names, indexers, model_shapes, in_fp8, tmp_path):
    """GLM-5.2's release has 118,629 names, and 1,048,576 positions."""
    written = write_holes(tmp_path / "source", config, model_shapes(config), in_fp8)
    assert written >= names if config is V32 else written == names
    summary = convert_checkpoint(tmp_path / "source", tmp_path / "out", method="rotate+mse", dry_run=True)
    roles = {role["role"]: role["tensors"] for role in summary.roles}
    assert roles["indexer"] + roles["mtp_indexer"] == indexers
    assert roles["indexer_float"] == roles["indexer_norm"] == 2 * (indexers - 1)
    assert roles["mtp_head"] == 1


@pytest.mark.parametrize(
    ("config", "experts", "mtp_experts", "attention"),
    [(GLM_47_FLASH, 46 * 64 * 3, 64 * 3, 47 * 4), (MOONLIGHT, 26 * 64 * 3, 0, 27 * 3)],
    ids=["glm-4.7-flash", "moonlight"],
)
def test_small_models_of_published_sizes(config, experts, mtp_experts, attention, model_shapes, tmp_path):
    """In bfloat16, as they are published."""
    write_holes(tmp_path / "source", config, model_shapes(config), lambda name: False)
    summary = convert_checkpoint(tmp_path / "source", tmp_path / "out", method="rotate+mse", dry_run=True)
    roles = {role["role"]: role["tensors"] for role in summary.roles}
    assert roles["routed_expert"] == experts and roles.get("mtp_routed_expert", 0) == mtp_experts
    assert roles["attention"] == attention
    assert [note for note in summary.notes if note.startswith("config.json")] == []


def test_the_memory_that_is_told(full_size, rig, tmp_path):
    answer = rig(full_size, tmp_path / "out", options={"dry_run": True})
    assert 0.7 < answer["memory"] / answer["summary"]["plan_bytes"] < 1.3


def test_the_command_prints_what_is_needed(full_size, tmp_path, npuq, monkeypatch):
    """And says that it would not start, where the disk has no room for it."""
    for free, status in ((10**12, 0), (54 * 10**9, 1)):
        monkeypatch.setattr("npuq.convert.plan.space.free_bytes", lambda output, free=free: free)
        outcome = npuq("convert", full_size, tmp_path / "out", "--dry-run", "--max-memory", "200MB")
        assert outcome.status == status
        for words in ("routed_expert", "46183 jobs", "689 GB → 371 GB", "236 MB for the plan", "disk: 371 GB needed"):
            assert words in outcome.stdout, words
        assert ("needs about 371 GB and 54 GB are free" in outcome.stderr) == bool(status)


def other_recipe(output: Path) -> dict[str, Any]:
    return {"recipe": "w8a8"}


def other_files(output: Path) -> dict[str, Any]:
    shutil.rmtree(output)
    output.mkdir()
    (output / "thesis.txt").write_text("precious")
    return {}


def a_file(output: Path) -> dict[str, Any]:
    shutil.rmtree(output)
    output.write_text("precious")
    return {}


def under_a_file(output: Path) -> dict[str, Any]:
    shutil.rmtree(output.parent)
    output.parent.write_text("precious")
    return {}


def a_lost_file(output: Path) -> dict[str, Any]:
    (output / "config.json").unlink(missing_ok=True)
    for shard in output.glob("*.safetensors"):
        shard.unlink()
    return {}


def no_journal(output: Path) -> dict[str, Any]:
    for name in ("manifest.json", "progress.jsonl"):
        (output / "npuq" / name).write_text("nonsense")
    return {}


@pytest.mark.parametrize("state", ["unfinished", "finished"])
@pytest.mark.parametrize("change", [other_recipe, other_files, a_file, under_a_file, a_lost_file, no_journal])
def test_a_dry_run_refuses_what_a_run_refuses(change, state, rig, v3_source, v3_artifact, tmp_path):
    """With the same words; and one that would run says so."""
    output, options = tmp_path / "deep" / "out", {"method": "minmax", "max_shard_size": 60_000}
    output.parent.mkdir()
    if state == "finished":
        shutil.copytree(v3_artifact, output)
    else:
        assert rig(v3_source, output, options=options, kill_at=100, slow=0.001, calls=["pwrite"])["killed"]
    planned = convert_checkpoint(v3_source, output, dry_run=True, **options)
    assert planned.refusal is None and planned.output_state == state
    changed = options | change(output)
    refusal = convert_checkpoint(v3_source, output, dry_run=True, **changed).refusal
    try:
        convert_checkpoint(v3_source, output, **changed)
    except NpuqError as error:
        assert str(error) == refusal
    else:
        # Shards that an unfinished conversion lost are made again.
        assert refusal is None and (change, state) == (a_lost_file, "unfinished")


def test_a_dry_run_beside_a_run(v3_source, tmp_path, rig):
    output, options = tmp_path / "out", {"method": "minmax", "max_shard_size": 60_000}
    assert rig(v3_source, output, options=options, kill_at=100, slow=0.001, calls=["pwrite"])["killed"]
    with (output / "npuq" / "progress.jsonl").open() as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        refusal = convert_checkpoint(v3_source, output, dry_run=True, **options).refusal
    assert refusal is not None and "another npuq is converting into it right now" in refusal


def test_a_dry_run_changes_nothing(v3_source, rig, tmp_path, tree):
    output, options = tmp_path / "out", {"method": "minmax", "max_shard_size": 60_000}
    assert rig(v3_source, output, options=options, kill_at=100, slow=0.001, calls=["pwrite"])["killed"]
    with (output / "npuq" / "progress.jsonl").open("ab") as journal:
        journal.write(b'{"jobs": torn')
    before = tree(output)
    assert convert_checkpoint(v3_source, output, dry_run=True, **options).jobs_resumed > 0
    assert tree(output) == before
