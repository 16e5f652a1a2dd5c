"""Dry runs of checkpoints of published sizes, from headers alone: their data are holes."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import published
import pytest
from holes import Header, write_holes
from published import GLM_45, GLM_45_AIR, GLM_47_FLASH, GLM_52, MOONLIGHT, QWEN3_30B, QWEN3_CODER_480B, V3, V32

from npuq.convert import convert_checkpoint
from npuq.errors import NpuqError


@pytest.fixture(scope="module")
def full_size(tmp_path_factory, model_shapes, in_fp8) -> Path:
    """671 billion parameters in 163 shards whose data are holes: a few MB on disk."""
    directory = tmp_path_factory.mktemp("full") / "source"
    assert write_release(directory, V3, model_shapes(V3), in_fp8) > 91_000
    return directory


def write_release(
    directory: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]], in_fp8: Callable[[str], bool]
) -> int:
    """A checkpoint without data, as the FP8 releases are stored; the number of its tensors."""
    tensors: list[Header] = []
    for name, shape in shapes.items():
        if in_fp8(name):
            blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
            tensors += [(name, "F8_E4M3", shape), (name + "_scale_inv", "F32", blocks)]
        else:
            tensors.append((name, "F32" if name.endswith("correction_bias") else "BF16", shape))
    write_holes(directory, config, tensors)
    return len(tensors)


@pytest.mark.parametrize(
    ("config", "names", "indexers"), [(V32, 92_000, 62), (GLM_52, 118_629, 22)], ids=["v3.2", "glm-5.2"]
)
def test_sparse_models_of_published_sizes(config, names, indexers, model_shapes, in_fp8, tmp_path):
    """GLM-5.2's release has 118,629 names, and 1,048,576 positions."""
    written = write_release(tmp_path / "source", config, model_shapes(config), in_fp8)
    assert written >= names if config is V32 else written == names
    summary = convert_checkpoint(tmp_path / "source", tmp_path / "out", method="rotate+mse", dry_run=True)
    roles = {role["role"]: role["tensors"] for role in summary.roles}
    assert roles["indexer"] + roles["mtp_indexer"] == indexers
    assert roles["indexer_float"] == roles["indexer_norm"] == 2 * (indexers - 1)
    assert roles["mtp_head"] == 1


@pytest.mark.parametrize(
    ("config", "experts", "mtp_experts", "attention"),
    [
        (GLM_47_FLASH, 46 * 64 * 3, 64 * 3, 47 * 4),
        (MOONLIGHT, 26 * 64 * 3, 0, 27 * 3),
        (QWEN3_30B, 48 * 128 * 3, 0, 48 * 4),
        (GLM_45_AIR, 45 * 128 * 3, 128 * 3, 46 * 4),
    ],
    ids=["glm-4.7-flash", "moonlight", "qwen3-30b", "glm-4.5-air"],
)
def test_small_models_of_published_sizes(config, experts, mtp_experts, attention, model_shapes, tmp_path):
    """In bfloat16, as they are published."""
    write_release(tmp_path / "source", config, model_shapes(config), lambda name: False)
    summary = convert_checkpoint(tmp_path / "source", tmp_path / "out", method="rotate+mse", dry_run=True)
    roles = {role["role"]: role["tensors"] for role in summary.roles}
    assert roles["routed_expert"] == experts and roles.get("mtp_routed_expert", 0) == mtp_experts
    assert roles["attention"] == attention
    assert [note for note in summary.notes if note.startswith("config.json")] == []


@pytest.mark.parametrize(
    ("config", "layers", "experts", "billions"),
    [(QWEN3_CODER_480B, 62, 160, 480), (GLM_45, 89, 160, 358)],
    ids=["qwen3-coder-480b", "glm-4.5"],
)
def test_large_models_with_grouped_query_attention(config, layers, experts, billions, model_shapes, tmp_path):
    """GLM's FP8 release is llm-compressor's: a scale for each row. Its biases stay as they are."""
    rows = config is GLM_45
    tensors: list[Header] = []
    for name, shape in model_shapes(config).items():
        quantized = "_proj.weight" in name and "eh_proj" not in name
        code = "F8_E4M3" if quantized else "F32" if name.endswith("correction_bias") else "BF16"
        tensors.append((name, code, shape))
        if quantized and rows:
            tensors.append((name.removesuffix("weight") + "weight_scale", "BF16", (shape[0], 1)))
        elif quantized:
            tensors.append((f"{name}_scale_inv", "BF16", (-(-shape[0] // 128), -(-shape[1] // 128))))
    write_holes(tmp_path / "source", config, tensors)
    summary = convert_checkpoint(tmp_path / "source", tmp_path / "out", method="rotate+mse", dry_run=True)
    roles = {role["role"]: role["tensors"] for role in summary.roles}
    assert roles["routed_expert"] == layers * experts * 3
    assert roles["attention"] == 4 * config["num_hidden_layers"]
    assert (roles.get("bias", 0), roles.get("mtp_bias", 0)) == ((3 * 92, 3) if rows else (0, 0))
    parameters = sum(prod(shape) for name, code, shape in tensors if "scale" not in name)
    assert parameters / 1e9 == pytest.approx(billions, rel=0.01)


def test_what_91000_tensors_become_and_the_memory_that_is_told(full_size, rig, tmp_path):
    answer = rig(full_size, tmp_path / "out", options={"dry_run": True})
    summary = answer["summary"]
    assert 0.7 < answer["memory"] / summary["plan_bytes"] < 1.3
    assert summary["jobs"] > 46_000 and summary["tensors"] > 180_000
    # Routed experts: 58 layers of 256 × 3 matrices of 7168 × 2048 in four bits, and their float32 columns.
    experts = next(role for role in summary["roles"] if role["role"] == "routed_expert")
    assert experts["tensors"] == 58 * 256 * 3
    columns = 2 * 2048 * 3 + 7168 * 18
    assert experts["output_bytes"] == 58 * 256 * (3 * 7168 * 2048 // 2 + 4 * columns)
    assert not (tmp_path / "out").exists()


def test_the_command_prints_what_is_needed(full_size, tmp_path, npuq, monkeypatch):
    """And says that it would not start, where the disk has no room for it."""
    monkeypatch.setattr("npuq.convert.plan.space.free_bytes", lambda output: 54 * 10**9)
    outcome = npuq("convert", full_size, tmp_path / "out", "--dry-run", "--max-memory", "200MB")
    assert outcome.status == 1
    for words in ("routed_expert", "46183 jobs", "689 GB → 371 GB", "236 MB for the plan", "disk: 371 GB needed"):
        assert words in outcome.stdout, words
    assert "needs about 371 GB and 54 GB are free" in outcome.stderr


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
    assert rig(v3_source, output, options=options, kill_at=100, slow=0.01, calls=["pwrite"])["killed"]
    with (output / "npuq" / "progress.jsonl").open("ab") as journal:
        journal.write(b'{"jobs": torn')
    before = tree(output)
    assert convert_checkpoint(v3_source, output, dry_run=True, **options).jobs_resumed > 0
    assert tree(output) == before


def first_layers(config, layers):
    """The release with its first layers alone, of every kind one: the others repeat them."""
    drafts = config["compress_ratios"][config["num_hidden_layers"] :]
    return {**config, "num_hidden_layers": layers, "compress_ratios": config["compress_ratios"][:layers] + drafts}


@pytest.mark.parametrize(
    ("config", "drafts", "tensors"),
    [
        pytest.param(first_layers(published.V4_FLASH, 5), 1, 1575, id="Flash"),
        pytest.param(published.V4_FLASH_0731, 3, 4705, id="Flash-0731"),
        pytest.param(first_layers(published.V4_PRO, 5), 1, 384 * 6 + 39, id="Pro"),
    ],
)
def test_deepseek_v4_at_its_published_size(tmp_path, monkeypatch, config, drafts, tensors):
    """`tensors`: those of the drafts, as many as the releases of Flash list."""
    layers, experts = config["num_hidden_layers"], config["n_routed_experts"]
    ratios = config["compress_ratios"][:layers]
    compressed, selecting = sum(ratio > 0 for ratio in ratios), ratios.count(4)
    monkeypatch.setattr("npuq.convert.plan.space.free_bytes", lambda output: 10**13)
    headers = published.write_release(tmp_path / "source", config)
    assert sum(name.startswith("mtp.") for name, *_ in headers) == tensors
    summary = convert_checkpoint(tmp_path / "source", tmp_path / "out", dry_run=True)
    assert summary.refusal is None
    roles = {(role["role"], role["scheme"]): role["tensors"] for role in summary.roles}
    assert roles["routed_expert", "W4A8_DYNAMIC"] == layers * experts * 3
    assert roles["mtp_routed_expert", "W8A8_DYNAMIC"] == drafts * experts * 3
    assert roles["attention", "W8A8_DYNAMIC"] == layers * 3 and roles["attention_output", "FLOAT"] == layers * 2
    assert roles["indexer", "W8A8_DYNAMIC"] == selecting
    # Of each compressor wkv, wgate, ape and norm; a selecting layer has an indexer's too.
    assert roles["compressor", "FLOAT"] == 4 * (compressed + selecting)
    assert roles["router_table", "FLOAT"] == 3 and roles["router_bias", "FLOAT"] == layers - 3
