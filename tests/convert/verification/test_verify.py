"""`verify` finds each kind of damage and names it; `inspect` says what is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import Artifact
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from npuq.convert import convert_checkpoint
from npuq.verification import inspect, verify

DESCRIPTION = "quant_model_description.json"
EXPERT = "model.layers.1.mlp.experts.0.down_proj"


@pytest.fixture
def artifact(v3_artifact: Path, tmp_path: Path) -> Artifact:
    shutil.copytree(v3_artifact, tmp_path / "copy")
    return Artifact(tmp_path / "copy")


@pytest.mark.parametrize("recipe", ["w4a8", "w8a8", "float"])
@pytest.mark.parametrize("family", ["v3", "kimi", "v2lite", "glm"])
def test_what_convert_makes_is_sound(recipe, family, make_checkpoint, tmp_path):
    source = make_checkpoint(family=family)
    convert_checkpoint(source, tmp_path / "out", recipe=recipe, method="minmax")
    verdict = verify(tmp_path / "out", source)
    assert verdict.problems == () and verdict.ok
    assert verdict.linears == len(verdict.errors) and (verdict.linears > 40) == (recipe != "float")
    assert all(0 < error.relative_error < (0.2 if error.scheme == "W4A8_DYNAMIC" else 0.01) for error in verdict.errors)


def test_a_flipped_bit_in_any_file(artifact, v3_artifact):
    manifest = json.loads((v3_artifact / "npuq" / "manifest.json").read_text())
    assert {str(p.relative_to(v3_artifact)) for p in v3_artifact.rglob("*") if p.is_file()} == {
        *manifest["files"],
        "npuq/manifest.json",
        "README.md",  # users and hubs edit it
    }
    for name in manifest["files"]:
        path = artifact.directory / name
        intact = path.read_bytes()
        middle = len(intact) // 2
        path.write_bytes(intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :])
        assert f"{name}: its sha256 is not the manifest's" in artifact.problems()
        path.write_bytes(intact[:-1])
        assert f"{name}: {len(intact) - 1} bytes" in artifact.problems()
        path.unlink()
        assert f"{name}: missing" in artifact.problems()
        path.write_bytes(intact)
    assert artifact.problems() == ""


def test_an_unfinished_directory(artifact):
    (artifact.directory / "npuq" / "manifest.json").unlink()
    assert "manifest.json: missing" in artifact.problems()


@pytest.mark.parametrize(
    ("tensor", "value", "said"),
    [
        (f"{EXPERT}.weight", 17, "scale_bias' disagrees with the stored codes"),
        (f"{EXPERT}.scale_bias", 1e-3, "scale_bias' disagrees with the stored codes"),
        (f"{EXPERT}.weight_scale", 0.5, "scale_bias' disagrees with the stored codes"),
        (f"{EXPERT}.weight_scale", 0.0, "a scale that is not a positive number"),
        (f"{EXPERT}.weight_scale", float("nan"), "a scale that is not a positive number"),
        (f"{EXPERT}.weight_offset", 1.0, "weight_offset' is not zero"),
        ("model.layers.0.self_attn.o_proj.weight_scale", -1.0, "a scale that is not a positive number"),
        ("model.layers.0.self_attn.kv_b_proj.weight", float("inf"), "kv_b_proj.weight' holds infinities or NaN"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", float("nan"), "holds infinities or NaN"),
    ],
)
def test_values_that_disagree(tensor, value, said, artifact):
    artifact.edit_tensors(tensor, lambda tensors: tensors[tensor].view(-1)[3:4].fill_(value))
    problems = artifact.problems()
    assert said in problems
    assert all(tensor.rpartition(".")[0] in problem for problem in problems.splitlines())


@pytest.mark.parametrize("slice_", range(16))
def test_every_slice_of_a_bias_is_checked(slice_, artifact):
    name = f"{EXPERT}.scale_bias"
    artifact.edit_tensors(name, lambda tensors: tensors[name][7, slice_].add_(1e-4))
    assert "disagrees with the stored codes" in artifact.problems()


@pytest.mark.parametrize(
    ("tensor", "edit", "said"),
    [
        (f"{EXPERT}.scale_bias", lambda t: t[:, :1], ["[64, 1]", "must be F32 [64, 16]"]),
        (f"{EXPERT}.weight", lambda t: t[:-1], ["[31, 32]", "must be I8 [32, 32]"]),
        (f"{EXPERT}.weight_scale", lambda t: t.bfloat16(), ["BF16", "must be F32"]),
        ("model.layers.1.mlp.gate.e_score_correction_bias", lambda t: t.bfloat16(), ["BF16", "must be F32"]),
        ("model.layers.0.self_attn.kv_b_proj.weight", lambda t: t.to(torch.int8), ["described as FLOAT", "I8"]),
        ("model.norm.weight", lambda t: t[:-1], ["[63]", "[64]"]),
    ],
)
def test_dtypes_and_shapes(tensor, edit, said, artifact):
    artifact.edit_tensors(tensor, lambda tensors: tensors.update({tensor: edit(tensors[tensor]).contiguous()}))
    line = next(line for line in artifact.problems().splitlines() if tensor in line)
    assert all(words in line for words in said)


@pytest.mark.parametrize("suffix", ["weight_scale", "weight_offset", "scale_bias"])
def test_missing_parts_of_a_linear(suffix, artifact):
    name = f"{EXPERT}.{suffix}"
    artifact.edit_tensors(name, lambda tensors: tensors.pop(name))
    artifact.edit_json(DESCRIPTION, lambda content: content.pop(name))
    assert f"tensor {name!r} is missing: W4A8_DYNAMIC needs it" in artifact.problems()


def test_missing_and_surplus_tensors(artifact):
    name = "model.layers.1.input_layernorm.weight"
    artifact.edit_tensors(name, lambda tensors: tensors.pop(name))
    artifact.edit_json(DESCRIPTION, lambda content: content.pop(name))
    assert f"tensor {name!r} is missing: config.json calls for it" in artifact.problems()
    surplus = "model.layers.0.self_attn.o_proj.scale_bias"
    artifact.edit_tensors(f"{EXPERT}.weight", lambda tensors: tensors.update({surplus: torch.zeros(64, 1)}))
    artifact.edit_json(DESCRIPTION, lambda content: content.update({surplus: "W8A8_DYNAMIC"}))
    assert f"tensor {surplus!r} belongs to no linear of its scheme" in artifact.problems()


def test_description_is_complete_both_ways(artifact):
    name = f"{EXPERT}.weight_offset"
    artifact.edit_json(DESCRIPTION, lambda content: content.pop(name))
    assert f"has no entry for tensor {name!r}" in artifact.problems()
    artifact.edit_json(DESCRIPTION, lambda content: content.update({name: "W4A8_DYNAMIC", "a.ghost": "FLOAT"}))
    assert "describes 'a.ghost', which no shard has" in artifact.problems()
    artifact.edit_json(DESCRIPTION, lambda content: content.update({"model.norm.bias": "FLOAT"}))
    assert "makes engines give every RMS norm of the model a bias" in artifact.problems()


@pytest.mark.parametrize(
    ("key", "value"),
    [("ascend_quant_method", None), ("version", "2"), ("model_quant_type", "W4A8")],
)
def test_description_globals(key, value, artifact):
    artifact.edit_json(DESCRIPTION, lambda content: content.update({key: value}))
    assert f"{key!r} is {value!r} and must be" in artifact.problems()


def test_scales_by_group_are_refused(artifact):
    artifact.edit_json(DESCRIPTION, lambda content: content.update({"group_size": 128}))
    assert "group_size 128: npuq and the engines read one scale a channel" in artifact.problems()


@pytest.mark.parametrize(
    ("names", "scheme", "said"),
    [
        (["model.layers.0.mlp.gate_proj.weight"], "FLOAT", "engines fuse gate_proj and up_proj"),
        (["model.layers.0.mlp.gate_proj.weight"], "W4A8_DYNAMIC", "only for the main model's routed experts"),
        (["model.layers.0.self_attn.q_a_proj.weight"], "FLOAT", "engines fuse q_a_proj and kv_a_proj_with_mqa"),
        (["model.layers.0.self_attn.kv_b_proj.weight"], "W8A8_DYNAMIC", "kv_b must stay FLOAT"),
        ([f"{EXPERT}.weight"], "W8A8_DYNAMIC", "all experts of a layer need one scheme"),
        ([f"{EXPERT}.weight"], "FLOAT", "engines refuse FLOAT routed experts"),
        ([f"{EXPERT}.weight_scale"], "W8A8_DYNAMIC", "its weight W4A8_DYNAMIC"),
        ([f"{EXPERT}.weight"], "W2A8", "unknown type 'W2A8'"),
    ],
)
def test_schemes_that_no_engine_loads(names, scheme, said, artifact):
    artifact.edit_json(DESCRIPTION, lambda content: content.update(dict.fromkeys(names, scheme)))
    problems = artifact.problems()
    assert said in problems and names[0] in problems


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda c: c.update(quantization_config={}), "quantization_config is left"),
        (lambda c: c.update(text_config={"quantization_config": {}}), "quantization_config under text_config is left"),
        (lambda c: c.pop("moe_quantize"), "'moe_quantize' is None, the description calls for 'w4a8_dynamic'"),
        (lambda c: c.update(quantize="w4a8_dynamic"), "'quantize' is 'w4a8_dynamic'"),
        (lambda c: c.update(hidden_size=128), "must be"),
        (lambda c: c.update(model_type="llama"), "model_type 'llama'"),
        (lambda c: c.update(rope_theta=5000), "rope.safetensors: rope_theta"),
    ],
)
def test_config(edit, said, artifact):
    artifact.edit_json("config.json", edit)
    assert said in artifact.problems()


def test_index(artifact):
    name = f"{EXPERT}.weight"

    def forget(content: dict[str, Any]) -> None:
        del content["weight_map"][name]

    artifact.edit_json("model.safetensors.index.json", forget)
    assert f"does not say that {name!r} is in" in artifact.problems()
    (artifact.directory / "model.safetensors.index.json").unlink()
    assert "model.safetensors.index.json" in artifact.problems()


@pytest.mark.parametrize(("table", "row"), [("cos", 0), ("sin", 97), ("cos", 255)])
def test_rope_tables(table, row, artifact):
    path = artifact.directory / "npuq" / "rope.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors[table][row, 1] += 1e-4
    save_file(tensors, path, metadata=metadata)
    artifact.seal()
    assert artifact.problems() == f"npuq/rope.safetensors: {table} at position {row} differs from its recomputation"
    save_file(load_file(path), path, metadata=metadata | {"softmax_scale": "1.0"})
    artifact.seal()
    assert "softmax_scale is '1.0' and must be" in artifact.problems()
    path.write_bytes(b"nonsense")
    artifact.seal()
    assert "npuq/rope.safetensors: malformed safetensors file" in artifact.problems()


def test_strays_that_engines_would_load(artifact):
    save_file({"x": torch.zeros(1)}, artifact.directory / "extra.safetensors")
    (artifact.directory / f"old_{DESCRIPTION}").write_text("{}")
    (artifact.directory / "notes.txt").write_text("harmless")
    problems = artifact.problems()
    assert "extra.safetensors: not part of the artifact" in problems
    assert f"old_{DESCRIPTION}: a second description" in problems
    assert "notes.txt" not in problems


def test_manifest_that_tells_something_else(artifact):
    def edit(content: dict[str, Any]) -> None:
        content["linears"][f"{EXPERT}.weight"]["scheme"] = "W8A8_DYNAMIC"
        content["linears"]["ghost.weight"] = content["linears"].pop("model.layers.0.self_attn.o_proj.weight")

    artifact.edit_json("npuq/manifest.json", edit)
    problems = artifact.problems()
    assert f"'{EXPERT}.weight' is W8A8_DYNAMIC, in the description W4A8_DYNAMIC" in problems
    assert "linear 'ghost.weight' is in the manifest alone" in problems
    assert "linear 'model.layers.0.self_attn.o_proj.weight' is in the description alone" in problems


@pytest.mark.parametrize(
    "content", ["[]", "{}", "nonsense", '{"format_version": 99}', '{"format_version": 1, "files": 3}']
)
def test_manifests_that_are_none(content, artifact):
    (artifact.directory / "npuq" / "manifest.json").write_text(content)
    assert "npuq/manifest.json" in artifact.problems()


def test_another_source_is_noticed(artifact, make_checkpoint, v3_source):
    assert artifact.problems(v3_source) == ""
    other = make_checkpoint(fp8_block=16, seed=1)
    problems = artifact.problems(other)
    assert "made from other weights" in problems and EXPERT in problems
    assert "tensor 'model.norm.weight' is not the source's" in problems
    wider = make_checkpoint(other.parent / "wider", config={"n_routed_experts": 6})
    assert artifact.problems(wider) != ""


def test_command_line(npuq, artifact, v3_source):
    outcome = npuq("verify", artifact.directory)
    assert outcome.status == 0 and ": ok (" in outcome.stdout
    outcome = npuq("verify", artifact.directory, "--source", v3_source, "--json")
    report = json.loads(outcome.stdout)
    assert outcome.status == 0 and report["ok"] and report["problems"] == []
    assert len(report["errors"]) == report["linears"] == 64
    assert {"name", "role", "scheme", "relative_error"} == set(report["errors"][0])
    (artifact.directory / "LICENSE").write_text("changed")
    outcome = npuq("verify", artifact.directory)
    assert outcome.status == 1 and "problem: LICENSE" in outcome.stdout and "1 problem " in outcome.stdout
    outcome = npuq("verify", artifact.directory, "--json")
    assert outcome.status == 1 and json.loads(outcome.stdout)["problems"]


def test_inspect(npuq, v3_artifact, v3_source):
    lines = {line.role: line for line in inspect(v3_artifact).lines}
    experts = lines["routed_expert"]
    assert (experts.scheme, experts.tensors, experts.parameters) == ("W4A8_DYNAMIC", 24, 24 * 64 * 32)
    # By hand: 4 bits a weight, and two float32 a row with one bias (gate, up) or sixteen (down) each.
    by_hand = 24 * 64 * 32 // 2 + 16 * 32 * 4 * 3 + 8 * 64 * 4 * 18
    assert experts.output_bytes == by_hand and experts.bits == pytest.approx(8 * by_hand / (24 * 64 * 32))
    assert experts.relative_error is not None and 0.05 < experts.relative_error < 0.2
    assert lines["kv_b"].relative_error is None and lines["kv_b"].bits == 16
    source = {line.role: line for line in inspect(v3_source).lines}
    assert source["routed_expert"].scheme == "F8_E4M3 16x16" and source["routed_expert"].source_bytes is None
    outcome = npuq("inspect", v3_artifact)
    assert outcome.status == 0 and "recipe w4a8, from source" in outcome.stdout and "W4A8_DYNAMIC" in outcome.stdout
    content = json.loads(npuq("inspect", v3_source, "--json").stdout)
    assert content["kind"] == "checkpoint" and {"role", "scheme", "tensors", "bits"} <= set(content["roles"][0])


def test_inspect_refuses_the_unfinished_and_the_damaged(artifact, npuq):
    (artifact.directory / "npuq" / "report.json").write_text("[]")
    assert npuq("inspect", artifact.directory).status == 1
    (artifact.directory / "npuq" / "manifest.json").write_text('{"format_version": 1}')
    outcome = npuq("inspect", artifact.directory)
    assert outcome.status == 1 and "does not say what it was made from" in outcome.stderr
    (artifact.directory / "npuq" / "manifest.json").unlink()
    outcome = npuq("inspect", artifact.directory)
    assert outcome.status == 1 and "manifest.json: missing" in outcome.stderr
