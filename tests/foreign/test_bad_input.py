"""ModelSlim directories that are damaged, incomplete, or hold what npuq has no scheme for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import pytest
import torch
from torch import Tensor

import npuq
from npuq.errors import NpuqError

EXPERT = "model.layers.1.mlp.experts.3.up_proj"
DOWN = "model.layers.2.mlp.experts.5.down_proj"
Q_A, KV_A, O = (f"model.layers.0.self_attn.{name}" for name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"))  # noqa: E741
STATIC = ("q_a_proj", "kv_a_proj_with_mqa")

Change = Callable[[Tensor], Tensor] | None


def swap_nibbles(t: Tensor) -> Tensor:
    bytes_ = t.view(torch.uint8)
    return (bytes_ << 4 | bytes_ >> 4).view(torch.int8)


DAMAGED: dict[str, tuple[str, Change, str]] = {
    "nibble order": (f"{EXPERT}.weight", swap_nibbles, f"'{EXPERT}.scale_bias' disagrees with the stored codes"),
    "nibble order, down": (f"{DOWN}.weight", swap_nibbles, f"'{DOWN}.scale_bias' disagrees"),
    "unsigned nibbles": (f"{EXPERT}.weight", lambda t: (t.view(torch.uint8) ^ 0x88).view(torch.int8), "disagrees"),
    "columns moved": (f"{DOWN}.weight", lambda t: t.roll(8, 1), f"'{DOWN}.scale_bias' disagrees"),
    "bias of one row": (f"{EXPERT}.scale_bias", lambda t: t.index_fill(0, torch.tensor([9]), 7.0), "disagrees"),
    "bias is NaN": (f"{EXPERT}.scale_bias", lambda t: t * float("nan"), "disagrees"),
    "bias shape": (f"{EXPERT}.scale_bias", lambda t: t[:-2], "which W4A8_DYNAMIC of 128 outputs cannot have"),
    "bias columns": (f"{EXPERT}.scale_bias", lambda t: t.repeat(1, 3), "which W4A8_DYNAMIC of 128 outputs cannot have"),
    "scale changed": (f"{EXPERT}.weight_scale", lambda t: t * 1.01, "disagrees with the stored codes"),
    "scale negative": (f"{O}.weight_scale", lambda t: -t, "is not a positive number"),
    "scales by group": (f"{O}.weight_scale", lambda t: t.repeat(1, 2), "npuq reads one scale a channel"),
    "asymmetric": (f"{O}.weight_offset", lambda t: t + 3, "asymmetric codes are not read"),
    "weight dtype": (f"{O}.weight", lambda t: t.float(), "is described as W8A8_DYNAMIC and stored as F32"),
    "weight shape": (f"{EXPERT}.weight", lambda t: t[:-1].contiguous(), "outputs cannot have"),
    "weight missing": (f"{O}.weight", None, f"'{O}.weight_offset' belongs to no linear of its scheme"),
    "scale missing": (f"{O}.weight_scale", None, "is missing: W8A8_DYNAMIC needs it"),
    "float weight missing": ("model.norm.weight", None, "is missing, but config.json calls for it"),
    "float weight shape": ("model.norm.weight", lambda t: t[:-1], "config.json implies"),
    "float weight NaN": ("model.norm.weight", lambda t: t * float("nan"), "holds infinities or NaN"),
    "input scale": (f"{Q_A}.input_scale", lambda t: t * 2, "'model.layers.0.self_attn.q_a_proj."),
    "input scale zero": (f"{Q_A}.input_scale", lambda t: t * 0, "is not a positive number"),
    "input scale shape": (f"{Q_A}.input_scale", lambda t: t.repeat(3), "cannot have"),
    "input offset": (f"{Q_A}.input_offset", lambda t: t + 1, "quant_bias' disagrees with the stored codes"),
    "input offset broken": (f"{Q_A}.input_offset", lambda t: t + 0.25, "is not a whole number"),
    "quant_bias": (f"{Q_A}.quant_bias", lambda t: t + 4000, "quant_bias' disagrees with the stored codes"),
    "quant_bias dtype": (f"{Q_A}.quant_bias", lambda t: t.float(), "cannot have"),
    "deq_scale": (f"{Q_A}.deq_scale", lambda t: -t, "is not a positive number"),
    "deq_scale missing": (f"{Q_A}.deq_scale", None, "is missing: W8A8 needs it"),
    "static codes": (f"{Q_A}.weight", lambda t: torch.where(t == 1, t + 1, t), "quant_bias' disagrees"),
}
# A ModelSlim static linear keeps deq_scale alone: a wrong input_scale is another scale of activations, seen only where
# the linear it is fused with has its own.
SHARED_ONLY = {"input scale"}


def write(float_model: Path, directory: Path, name: str, change: Change) -> Path:
    def edit(tensors: dict[str, Tensor]) -> None:
        if change is None:
            del tensors[name]
        else:
            tensors[name] = change(tensors[name]).contiguous()

    return foreign.write_modelslim(
        float_model,
        directory,
        static=STATIC,
        edit=edit,
        edit_types=lambda types: types.pop(name) if change is None else None,
    )


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_found_and_named(case, float_model, tmp_path):
    name, change, message = DAMAGED[case]
    directory = write(float_model, tmp_path / "in", name, change)
    verdict = npuq.verify(directory)
    assert any(message in problem for problem in verdict.problems), verdict.problems
    assert not any("\n" in problem for problem in verdict.problems)
    if case not in SHARED_ONLY:
        with pytest.raises(NpuqError) as caught:
            npuq.convert_checkpoint(directory, tmp_path / "out")
        assert message in str(caught.value) and "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "npuq" / "manifest.json").exists()


TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "4 bits called 8": ({f"{EXPERT}.{s}": "W8A8_DYNAMIC" for s in ("weight", "weight_scale")}, "outputs cannot have"),
    "8 bits called 4": ({f"{O}.weight": "W4A8_DYNAMIC"}, "outputs cannot have"),
    "one part of another type": ({f"{O}.weight_scale": "W4A8_DYNAMIC"}, "is described as W4A8_DYNAMIC, its weight as"),
    "static called dynamic": ({f"{Q_A}.weight": "W8A8_DYNAMIC"}, "is missing: W8A8_DYNAMIC needs it"),
    "dynamic called static": (
        {f"{O}.{s}": "W8A8" for s in ("weight", "weight_scale", "weight_offset")},
        "is missing: W8A8 needs it",
    ),
    "codes called float": ({f"{O}.weight": "FLOAT"}, "is I8, but nothing says how it is quantized"),
    "float called codes": ({"model.norm.weight": "W8A8_DYNAMIC"}, "is described as W8A8_DYNAMIC and stored as BF16"),
    "unknown": ({f"{O}.weight": "W8A16"}, "unknown type 'W8A16'; npuq knows W4A8_DYNAMIC, W8A8_DYNAMIC, W8A8, FLOAT"),
    "flatquant": ({f"{O}.weight": "W4A4_FLATQUANT_DYNAMIC"}, "unknown type 'W4A4_FLATQUANT_DYNAMIC'"),
    "unpacked": ({"version": "0.0.0"}, "version '0.0.0': its 4-bit weights lie in ModelSlim's older, unpacked layout"),
    "groups": ({"group_size": 256}, "group_size 256: npuq and the engines read one scale a channel"),
}


@pytest.mark.parametrize("name", ["model.norm.bias", f"{Q_A}.bias", "model.layers.0.input_layernorm.bias"])
def test_a_bias_is_refused_everywhere(name, float_model, tmp_path):
    """Nobody would add it: the output would be wrong without a word."""
    directory = foreign.write_modelslim(
        float_model,
        tmp_path / "in",
        edit=lambda tensors: tensors.update({name: torch.ones(256).bfloat16()}),
        edit_types=lambda types: types.update({name: "FLOAT"}),
    )
    message = f"tensor '{name}': npuq and the engines compute without biases"
    assert any(message in problem for problem in npuq.verify(directory).problems)
    for use in (npuq.load, lambda path: npuq.convert_checkpoint(path, tmp_path / "out")):
        with pytest.raises(NpuqError) as caught:
            use(directory)
        assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


# The runtime asks for the types of linears' weights alone.
UNREAD = {"one part of another type", "float called codes"}


@pytest.mark.parametrize("case", TYPES)
def test_a_wrong_type_is_found_and_named(case, float_model, tmp_path):
    changes, message = TYPES[case]
    directory = foreign.write_modelslim(
        float_model, tmp_path / "in", static=STATIC, edit_types=lambda types: types.update(changes)
    )
    assert any(message in problem for problem in npuq.verify(directory).problems), npuq.verify(directory).problems
    with pytest.raises(NpuqError) as caught:
        npuq.convert_checkpoint(directory, tmp_path / "out")
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    if case not in UNREAD:
        with pytest.raises(NpuqError):
            npuq.load(directory)


def test_names_that_are_described_but_not_there(float_model, tmp_path):
    directory = foreign.write_modelslim(
        float_model,
        tmp_path / "in",
        edit_types=lambda types: (
            types.update({"model.layers.9.extra.weight": "FLOAT"}) or types.pop("model.norm.weight")
        ),
    )
    problems = "\n".join(npuq.verify(directory).problems)
    assert "describes 'model.layers.9.extra.weight', which no shard has" in problems
    assert "has no entry for tensor 'model.norm.weight'" in problems
    # Neither keeps npuq from knowing the model: conversion repairs both.
    npuq.convert_checkpoint(directory, tmp_path / "out")
    assert npuq.verify(tmp_path / "out").problems == ()


def test_a_renamed_tensor(float_model, tmp_path):
    def rename(content: dict[str, Any]) -> None:
        for suffix in ("weight", "weight_scale", "weight_offset"):
            content[f"model.layers.0.self_attn.out_proj.{suffix}"] = content.pop(f"{O}.{suffix}")

    directory = foreign.write_modelslim(float_model, tmp_path / "in", edit=rename, edit_types=rename)
    assert f"tensor '{O}.weight' is missing" in "\n".join(npuq.verify(directory).problems)
    with pytest.raises(NpuqError, match="is missing, but config"):
        npuq.convert_checkpoint(directory, tmp_path / "out")
    with pytest.raises(NpuqError, match="no entry for"):
        npuq.load(directory)


def test_two_descriptions_or_indexes(float_model, tmp_path):
    directory = foreign.write_modelslim(float_model, tmp_path / "in", legacy_names=True)
    first = directory / "quant_model_description_w8a8_dynamic.json"
    (directory / "quant_model_description_w4a8.json").write_bytes(first.read_bytes())
    assert "which description is meant?" in "\n".join(npuq.verify(directory).problems)
    (directory / "quant_model_description_w4a8.json").unlink()
    for name in ("a", "b"):
        (directory / f"{name}.safetensors.index.json").write_text("{}")
    assert "which index is meant?" in "\n".join(npuq.verify(directory).problems)


def test_a_stray_shard(float_model, tmp_path):
    directory = foreign.write_modelslim(float_model, tmp_path / "in")
    shard = next(directory.glob("*.safetensors"))
    (directory / "old.safetensors").write_bytes(shard.read_bytes())
    assert "old.safetensors: not part of the artifact" in "\n".join(npuq.verify(directory).problems)


def test_a_truncated_shard_and_a_missing_one(float_model, tmp_path):
    directory = foreign.write_modelslim(float_model, tmp_path / "in")
    shard = sorted(directory.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    assert f"{shard}: truncated" in npuq.verify(directory).problems[0]
    shard.unlink()
    assert f"{shard}: missing" in npuq.verify(directory).problems[0]
    for act in (npuq.load, npuq.inspect, lambda path: npuq.convert_checkpoint(path, tmp_path / "out")):
        with pytest.raises(NpuqError, match="missing"):
            act(directory)


def test_a_description_that_is_none(float_model, tmp_path):
    directory = foreign.write_modelslim(float_model, tmp_path / "in")
    (directory / "quant_model_description.json").write_text("[1")
    assert "quant_model_description.json: not valid JSON" in npuq.verify(directory).problems[0]
    (directory / "quant_model_description.json").write_text(json.dumps({}))
    assert "nothing says how it is quantized" in "\n".join(npuq.verify(directory).problems)


def test_recipes_and_sources_that_do_not_go_together(float_model, tmp_path):
    directory = foreign.write_modelslim(float_model, tmp_path / "in")
    for recipe in ("w4a8", "float"):
        with pytest.raises(NpuqError, match="this one is quantized already: leave --recipe out"):
            npuq.convert_checkpoint(directory, tmp_path / "out", recipe=recipe)
    with pytest.raises(NpuqError, match="leave --method out"):
        npuq.convert_checkpoint(directory, tmp_path / "out", method="mse")
    with pytest.raises(NpuqError, match="keeps the schemes of the source, and this one is not quantized"):
        npuq.convert_checkpoint(float_model, tmp_path / "out", recipe="stored")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schemes: stored\nrules: []\n")
    with pytest.raises(NpuqError, match="'schemes' can only be 'stored'"):
        npuq.convert_checkpoint(directory, tmp_path / "out", recipe=recipe)
    assert not (tmp_path / "out").exists()


def test_what_engines_refuse_is_refused(float_model, tmp_path):
    directory = foreign.write_modelslim(float_model, tmp_path / "in", static=("q_a_proj",))
    message = "engines fuse q_a_proj and kv_a_proj_with_mqa: give them one scheme"
    assert message in "\n".join(npuq.verify(directory).problems)
    with pytest.raises(NpuqError, match=message):
        npuq.convert_checkpoint(directory, tmp_path / "out")


def test_an_unfinished_conversion_is_no_source(float_model, tmp_path):
    npuq.convert_checkpoint(foreign.write_modelslim(float_model, tmp_path / "in"), tmp_path / "out")
    (tmp_path / "out" / "npuq" / "manifest.json").unlink()
    for act in (npuq.load, npuq.inspect, lambda path: npuq.convert_checkpoint(path, tmp_path / "again")):
        with pytest.raises(NpuqError, match="no finished npuq artifact"):
            act(tmp_path / "out")
