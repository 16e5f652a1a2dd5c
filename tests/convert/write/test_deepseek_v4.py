"""A release of DeepSeek-V4 converted: FP8, FP4 and tables as their values are, Huawei's mix, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepseek_v4 import CONFIG, golden_model
from packed_v4 import RELEASE, write, write_release, write_values
from safetensors.torch import load_file, save_file

from npuq.convert import convert_checkpoint
from npuq.errors import CheckpointError, RecipeError
from npuq.formats.artifact import DESCRIPTION_NAME
from npuq.models.config import ModelConfig
from npuq.report.facts import read_facts
from npuq.verification import verify

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packed checkpoint, its values in bfloat16, and the artifacts of both."""
    directory = tmp_path_factory.mktemp("v4")
    values = write_release(directory / "packed")
    write_values(directory / "values", values)
    for name in ("packed", "values"):
        convert_checkpoint(directory / name, directory / f"{name}-w4a8")
    return directory


def test_packed_weights_convert_as_their_values(release: Path) -> None:
    made = [(release / f"{name}-w4a8" / SHARD).read_bytes() for name in ("packed", "values")]
    assert made[0] == made[1]


def test_the_mix_of_schemes(release: Path) -> None:
    listed = json.loads((release / "packed-w4a8" / DESCRIPTION_NAME).read_text())
    expected = {
        "layers.1.ffn.experts.3.w2.weight": "W4A8_DYNAMIC",
        "layers.1.ffn.shared_experts.w1.weight": "W8A8_DYNAMIC",
        "layers.1.attn.wq_a.weight": "W8A8_DYNAMIC",
        "layers.1.attn.wq_b.weight": "W8A8_DYNAMIC",
        "layers.1.attn.wkv.weight": "W8A8_DYNAMIC",
        "layers.1.attn.indexer.wq_b.weight": "W8A8_DYNAMIC",
        "mtp.0.ffn.experts.3.w1.weight": "W8A8_DYNAMIC",
        "layers.1.attn.wo_a.weight": "FLOAT",
        "layers.1.attn.wo_b.weight": "FLOAT",
        "layers.1.attn.compressor.wkv.weight": "FLOAT",
        "layers.1.attn.indexer.weights_proj.weight": "FLOAT",
        "layers.0.ffn.gate.tid2eid": "FLOAT",
        "mtp.0.e_proj.weight": "FLOAT",
        "hc_head_fn": "FLOAT",
        "hc_head_base": "FLOAT",
        "hc_head_scale": "FLOAT",
    }
    assert {name: listed[name] for name in expected} == expected
    assert not [name for name in listed if name.endswith(".scale")]


def test_dtypes_and_tables_stay(release: Path) -> None:
    source, made = load_file(release / "packed" / "model.safetensors"), load_file(release / "packed-w4a8" / SHARD)
    for name in ("hc_head_fn", "layers.0.hc_attn_base", "layers.1.attn.attn_sink", "layers.1.attn.compressor.ape"):
        assert made[name].dtype is torch.float32 and torch.equal(made[name], source[name])
    for name in ("layers.2.ffn.gate.bias", "layers.0.ffn.gate.tid2eid", "embed.weight"):
        assert made[name].dtype is source[name].dtype and torch.equal(made[name], source[name])
    assert made["layers.1.attn.wo_a.weight"].dtype is torch.bfloat16
    config = json.loads((release / "packed-w4a8" / "config.json").read_text())
    assert "expert_dtype" not in config and "quantization_config" not in config


def test_it_verifies_with_and_without_its_source(release: Path) -> None:
    for source in (None, release / "packed", release / "values"):
        verdict = verify(release / "packed-w4a8", source=source)
        assert verdict.problems == ()


def test_both_spellings_of_a_config_are_one() -> None:
    theirs = json.loads(golden_model(CONFIG).config.to_json_string(use_diff=False))
    assert {"layer_types", "mlp_layer_types", "compress_rates"} <= theirs.keys() and "compress_ratios" not in theirs
    ours = ModelConfig.from_dict({**CONFIG, "dtype": "float32"})
    assert ModelConfig.from_dict({**theirs, "model_type": "deepseek_v4", "dtype": "float32"}) == ours


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_ratios": [0, 4]}, "compress_ratios has 2 numbers for 4"),
        ({"compress_ratios": [0, 4, 24, 128]}, "all layers have one ratio"),
        ({"num_key_value_heads": 4}, "num_key_value_heads must be 1"),
        ({"swiglu_limit": None}, "swiglu_limit is missing"),
        ({"swiglu_limit": 0.0}, "swiglu_limit 0"),
        ({"n_shared_experts": 2}, "n_shared_experts must be 1"),
        ({"o_groups": 3}, "cannot be divided"),
        ({"qk_rope_head_dim": 64}, "cannot hold"),
        ({"layer_types": ["sliding_attention"] * 4}, "disagree"),
        ({"layer_types": ["sliding_attention"] * 4, "compress_ratios": 4}, "compress_ratios must be a list"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]}, "hash_moe layers first"),
        ({"rope_scaling": {**CONFIG["rope_scaling"], "attention_factor": 2.0}}, "attention_factor"),
        ({"num_hash_layers": 5}, "num_hash_layers"),
        ({"hc_mult": 10**9}, "hc_mult"),
    ],
)
def test_a_config_that_no_loader_computes_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelConfig.from_dict({**CONFIG, **changes})


@pytest.mark.parametrize(
    ("method", "reason"),
    [("rotate+mse", "hyper-connection"), ("smooth+mse", "swiglu_limit"), ("gptq", "calibration does not run")],
)
def test_methods_without_a_derivation_are_refused(release: Path, tmp_path: Path, method: str, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        convert_checkpoint(release / "packed", tmp_path / "out", method=method)


def test_floats_in_the_place_of_a_table_are_refused(release: Path, tmp_path: Path) -> None:
    tensors = load_file(release / "packed" / "model.safetensors")
    tables = {name: tensor.float() for name, tensor in tensors.items() if name.endswith("tid2eid")}
    write(tmp_path / "floats", RELEASE, {**tensors, **tables})
    with pytest.raises(CheckpointError, match="tid2eid' is F32; it must be I64"):
        convert_checkpoint(tmp_path / "floats", tmp_path / "out")
    gate = "layers.2.ffn.gate.weight"
    save_file({**tensors, gate: tensors[gate].long()}, tmp_path / "floats" / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{gate}' is I64; it must be of floats"):
        convert_checkpoint(tmp_path / "floats", tmp_path / "out")


TABLE = "layers.1.ffn.gate.tid2eid"


@pytest.mark.parametrize("number", [8, -1])
def test_experts_that_are_not_there_are_refused(release: Path, tmp_path: Path, number: int) -> None:
    """A loader gathers by these numbers: of a model with 8 experts, 8 is the first outside."""
    said = f"{TABLE}' has the number {number}, and must have 0 to 7"
    for name, changed in (("packed", tmp_path / "source"), ("packed-w4a8", tmp_path / "made")):
        shutil.copytree(release / name, changed)
        (shard,) = changed.glob("*.safetensors")
        tensors = load_file(shard)
        tensors[TABLE][7, 1] = number
        save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert [line for line in verify(tmp_path / "made").problems if said in line]
    # As another tool's, which has no manifest.
    shutil.rmtree(tmp_path / "made/npuq")
    assert [line for line in verify(tmp_path / "made").problems if said in line]


def test_releases_that_drop_the_limit_are_named(release: Path, tmp_path: Path) -> None:
    summary = convert_checkpoint(release / "packed", tmp_path / "out", dry_run=True)
    dropped = [line for line in summary.notes if "swiglu_limit" in line]
    assert [line.split(":")[0] for line in dropped] == ["vllm-ascend 0.23.0", "sglang 0.5.23"]


def test_the_report_has_what_int4_adds_to_fp4(release: Path) -> None:
    """Against float64: the first rows of every expert, by the best scale of each row and by its largest weight."""
    values, made = load_file(release / "values" / "model.safetensors"), release / "packed-w4a8"
    names = [name for name in values if name.startswith("layers.") and ".experts." in name]
    chosen = names[:: -(-len(names) // 64)]
    rows = torch.cat([values[name][:8].double() for name in chosen])
    scale = (rows.abs().amax(1, keepdim=True).float() / 7).double()
    error = (rows - (rows / scale).round() * scale).square().sum() / rows.square().sum()
    stated = json.loads((made / "npuq/manifest.json").read_text())["source"]["fp4_error"]
    assert stated["rows"] == len(rows)
    assert stated["minmax"] == pytest.approx(float(error) ** 0.5, rel=1e-3)
    assert 0 < stated["mse"] < stated["minmax"]
    facts = read_facts(made)
    assert "by minmax" in facts.provenance["weight error from FP4 to int4"]
