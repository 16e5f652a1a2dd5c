"""compressed-tensors checkpoints become artifacts; what there is no scheme for is refused in a line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import npuq
from npuq.errors import CheckpointError, NpuqError, RecipeError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights

EXPERT = "model.layers.1.mlp.experts.3.down_proj"
Q_A = "model.layers.0.self_attn.q_a_proj"


@pytest.fixture(scope="module", params=["int4", "int4 packed", "int8"])
def directory(request: pytest.FixtureRequest, float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bits, packed = (8 if request.param == "int8" else 4), request.param == "int4 packed"
    folder = tmp_path_factory.mktemp("compressed")
    return foreign.write_compressed(float_model, folder / "model", bits=bits, packed=packed)


def weights_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_it_becomes_an_artifact(directory, float_model, float_tensors, tmp_path):
    summary = npuq.convert_checkpoint(directory, tmp_path / "out", max_shard_size=4_000_000)
    assert (summary.status, summary.recipe) == ("converted", "stored")
    verdict = npuq.verify(tmp_path / "out", float_model)
    assert verdict.problems == ()
    four = "int8" not in str(directory) and any(e.scheme == "W4A8_DYNAMIC" for e in verdict.errors)
    # Their scales are rounded to bfloat16: 8-bit errors stay below two percent, 4-bit ones below twenty.
    assert all(0 < e.relative_error < (0.2 if e.scheme == "W4A8_DYNAMIC" else 0.02) for e in verdict.errors)
    ours = weights_of(tmp_path / "out")
    codes, scale = foreign.codes_of(float_tensors[f"{EXPERT}.weight"], 4 if four else 8)
    stored = ours[f"{EXPERT}.weight"]
    if four:
        nibbles = stored.view(torch.uint8)
        stored = torch.stack([nibbles & 15, nibbles >> 4], dim=1).flatten(0, 1).to(torch.int64)
        stored = torch.where(stored > 7, stored - 16, stored)
    assert stored.tolist() == codes.tolist()
    expected = torch.from_numpy(scale).bfloat16().float()
    assert torch.equal(ours[f"{EXPERT}.weight_scale"], expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["quantize"] == "w8a8_dynamic"
    assert config["moe_quantize"] == ("w4a8_dynamic" if four else "w8a8_dynamic")
    completion = npuq.load(tmp_path / "out").generate([list(range(40, 80))], max_new_tokens=4)[0]
    assert completion.completion_tokens > 0


def test_inspect_and_load(directory):
    assert npuq.inspect(directory).kind == "quantized_checkpoint"
    with pytest.raises(CheckpointError, match="compressed-tensors weights: run `npuq convert` on it first"):
        npuq.load(directory)
    problems = npuq.verify(directory).problems
    assert problems == (f"{directory}: compressed-tensors weights: run `npuq convert` on it, and verify the result",)


def test_an_exact_name_goes_before_a_pattern(float_model, float_tensors, tmp_path):
    """Wherever in the file its group is: as compressed-tensors itself chooses."""
    names = [name.removesuffix(".weight") for name in float_tensors if foreign.is_expert(name, layers=4)]

    def edit(content: dict[str, Any]) -> None:
        eight, four = content["config_groups"].values()
        content["config_groups"] = {"all": eight | {"targets": ["re:.*"]}, "experts": four | {"targets": names}}

    found = npuq.inspect(foreign.write_compressed(float_model, tmp_path / "in", edit_config=edit))
    assert {line.scheme for line in found.lines if line.role == "routed_expert"} == {"W4A8_DYNAMIC"}
    assert {line.scheme for line in found.lines if line.role == "mtp_routed_expert"} == {"W8A8_DYNAMIC"}


def test_what_engines_need_in_float_is_refused(float_model, float_tensors, tmp_path):
    name = "model.layers.0.self_attn.kv_b_proj"

    def edit(tensors: dict[str, Tensor]) -> None:
        codes, scale = foreign.codes_of(float_tensors[f"{name}.weight"], 8)
        tensors[f"{name}.weight"] = torch.from_numpy(codes).to(torch.int8)
        tensors[f"{name}.weight_scale"] = torch.from_numpy(scale)

    directory = foreign.write_compressed(
        float_model, tmp_path / "in", edit=edit, edit_config=lambda content: content["ignore"].remove(name)
    )
    with pytest.raises(RecipeError, match=f"the source has W8A8_DYNAMIC for '{name}.weight': the role kv_b must stay"):
        npuq.convert_checkpoint(directory, tmp_path / "out")


@pytest.mark.parametrize("where", ["targets", "ignore"])
def test_a_pattern_that_never_ends_is_refused(where, float_model, tmp_path, monkeypatch):
    monkeypatch.setattr("npuq.inputs.patterns._SECONDS", 0.2)

    def edit(content: dict[str, Any]) -> None:
        (group(content) if where == "targets" else content)[where] = ["re:(.|..)*[^a-z0-9._]$"]

    directory = foreign.write_compressed(float_model, tmp_path / "in", edit_config=edit)
    for read in (npuq.inspect, lambda path: npuq.convert_checkpoint(path, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"config\.json: .*takes too long to match"):
            read(directory)


def test_many_exact_names_take_no_time(float_model, float_tensors, tmp_path):
    """llm-compressor lists what it leaves out by name, and a hostile file may list more than there are modules."""
    names = [f"model.layers.{number}.x" for number in range(200_000)]
    directory = foreign.write_compressed(
        float_model, tmp_path / "in", edit_config=lambda content: content["ignore"].extend(names)
    )
    started = time.process_time()
    assert npuq.inspect(directory).kind == "quantized_checkpoint"
    assert time.process_time() - started < 10


def group(content: dict[str, Any]) -> dict[str, Any]:
    return content["config_groups"]["group_1"]


REFUSED = {
    "groups": (
        lambda c: group(c)["weights"].update(strategy="group", group_size=128),
        "config.json: group_1: weights by group of 128: only one scale a channel is read: use strategy 'channel'",
    ),
    "one scale for all": (lambda c: group(c)["weights"].update(strategy="tensor"), "weights by tensor: only one scale"),
    "asymmetric": (
        lambda c: group(c)["weights"].update(symmetric=False),
        "group_1: asymmetric weights are not read; quantize with symmetric: true",
    ),
    "actorder": (
        lambda c: group(c)["weights"].update(actorder="group"),
        "group_1: actorder 'group' reorders input channels",
    ),
    "float8": (lambda c: group(c)["weights"].update(type="float"), "type 'float': npuq reads int of 4 and 8 bits"),
    "2 bits": (lambda c: group(c)["weights"].update(num_bits=2), "weights of 2 bits"),
    "weight only": (lambda c: group(c).update(input_activations=None), "activations stay float (weight-only)"),
    "static activations": (
        lambda c: group(c)["input_activations"].update(dynamic=False, strategy="tensor"),
        "activations must be int8, symmetric, dynamic and per token",
    ),
    "output activations": (lambda c: group(c).update(output_activations={"num_bits": 8}), "output_activations"),
    "marlin": (lambda c: group(c).update(format="marlin-24"), "format 'marlin-24' is not read"),
    "packed int8": (
        lambda c: c["config_groups"]["group_0"].update(format="pack-quantized"),
        "group_0: packed weights of 8 bits are not read",
    ),
    "cache": (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    "sparse": (lambda c: c.update(sparsity_config={"format": "sparse-24"}), "sparsity_config"),
    "rotations": (lambda c: c.update(transform_config={"config_groups": {"u": {}}}), "rotations at run time"),
    "pattern": (lambda c: group(c).update(targets=["re:("]), "pattern '(' is no regular expression"),
    "a format that is none": (lambda c: group(c).update(format=[1]), "format [1] is not read"),
    "a group size that is none": (lambda c: group(c)["weights"].update(group_size="x"), "weights by channel of x"),
    "no groups": (lambda c: c.pop("config_groups"), "has no config_groups"),
    "no targets": (lambda c: group(c).pop("targets"), "group_1: needs targets and weights"),
    "nobody's scale": (lambda c: c["ignore"].append(Q_A), f"does not quantize '{Q_A}'"),
    "other widths": (lambda c: c["config_groups"].pop("group_1"), "config.json implies"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_scheme_is_refused(case, float_model, tmp_path):
    edit, message = REFUSED[case]
    if case == "other widths":  # 4-bit experts read as 8-bit ones are codes of an eighth of the inputs, or of int32
        message = "is I32"
    source = foreign.write_compressed(float_model, tmp_path / "in", packed=case == "other widths", edit_config=edit)
    with pytest.raises(NpuqError) as caught:
        npuq.convert_checkpoint(source, tmp_path / "out")
    if case == "other widths":
        assert f"'{EXPERT}.weight" in str(caught.value) or "experts" in str(caught.value)
    else:
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("order", ["static", "weight"])
def test_gptq_s_order_of_work_does_not_matter(order, float_model, tmp_path):
    """llm-compressor's GPTQ writes actorder `static` by default: the channels are where they were."""

    def edit(content: dict[str, Any]) -> None:
        for one in content["config_groups"].values():
            one["weights"].update(actorder=order)

    source = foreign.write_compressed(float_model, tmp_path / "in", edit_config=edit)
    npuq.convert_checkpoint(source, tmp_path / "out")
    assert npuq.verify(tmp_path / "out", float_model).problems == ()


DAMAGED = {
    "weight dtype": (f"{EXPERT}.weight", lambda t: t.to(torch.int32), "is I32"),
    "weight shape": (f"{EXPERT}.weight", lambda t: t[:-1], "npuq reads one scale for each of 255 channels"),
    "transposed": (f"{Q_A}.weight", lambda t: t[:, :-1], "has shape"),
    "group scales": (f"{EXPERT}.weight_scale", lambda t: t.repeat(1, 4), "npuq reads one scale for each of 256"),
    "scale dtype": (f"{EXPERT}.weight_scale", lambda t: t.to(torch.int32), "is I32"),
    "a zero scale": (f"{EXPERT}.weight_scale", lambda t: t * 0, "holds a scale that is not a positive number"),
    "an infinite scale": (f"{EXPERT}.weight_scale", lambda t: t / 0, "holds a scale that is not a positive number"),
    "8-bit codes": (f"{EXPERT}.weight", lambda t: t.clone().fill_(8), "holds codes outside"),
    "no scale": (f"{EXPERT}.weight_scale", None, "is I8, but nothing says how it is quantized"),
    "no weight": (f"{EXPERT}.weight", None, f"has no '{EXPERT}.weight' in any shard"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_found(case, float_model, tmp_path):
    name, change, message = DAMAGED[case]

    def edit(tensors: dict[str, Tensor]) -> None:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()

    source = foreign.write_compressed(float_model, tmp_path / "in", edit=edit)
    with pytest.raises(NpuqError) as caught:
        npuq.convert_checkpoint(source, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "npuq" / "manifest.json").exists()


def test_a_window_is_told_what_is_done_by_its_tensors(float_model, tmp_path):
    """Finished weights are named by what they are, and announced by what they are stored in."""

    class Window:
        max_bytes = 1 << 30

        def start(self, groups, finished):
            self.left = [group for group in groups if group[0] not in finished]

        def release(self, group):
            self.left.remove(group)

    directory = foreign.write_compressed(float_model, tmp_path / "in", packed=True)
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.window = window = Window()
        source = open_weights(checkpoint)
        source.announce([f"{EXPERT}.weight", f"{Q_A}.weight"], {f"{EXPERT}.weight"})
        assert window.left == [(f"{Q_A}.weight", f"{Q_A}.weight_scale")]
        source.release(f"{Q_A}.weight")
        assert window.left == []
