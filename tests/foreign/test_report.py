"""`npuq report` on what ModelSlim writes: sizes and scales, against the files themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from foreign import write_compressed, write_modelslim
from safetensors.torch import load_file

from npuq.errors import ArtifactError
from npuq.report import read_facts
from npuq.report.page import render

STATIC = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")


@pytest.mark.parametrize("legacy", [False, True], ids=["shards", "legacy names"])
def test_sizes_and_scales(float_model: Path, tmp_path: Path, legacy: bool) -> None:
    directory = write_modelslim(float_model, tmp_path / "model", legacy_names=legacy)
    stored = {}
    for shard in directory.glob("*.safetensors"):
        stored |= load_file(shard)
    facts = read_facts(directory)
    assert facts.output_bytes == sum(tensor.nbytes for tensor in stored.values())
    (experts,) = (role for role in facts.roles if role.role == "routed_expert")
    mine = {name: tensor for name, tensor in stored.items() if ".mlp.experts." in name and "layers.4." not in name}
    assert experts.scheme == "W4A8_DYNAMIC"
    assert experts.output_bytes == sum(tensor.nbytes for tensor in mine.values())
    codes = [tensor for name, tensor in mine.items() if name.endswith(".weight")]
    assert (experts.tensors, experts.parameters) == (len(codes), 2 * sum(tensor.numel() for tensor in codes))
    channels = {histogram.role: histogram.channels for histogram in facts.scales}
    assert channels["routed_expert"] == 2 * sum(len(tensor) for tensor in codes)
    assert "not made by npuq" in render(facts)


def test_static_linears_have_no_scales_of_their_own(float_model: Path, tmp_path: Path) -> None:
    facts = read_facts(write_modelslim(float_model, tmp_path / "model", static=STATIC))
    static = [linear for linear in facts.linears if linear.scheme == "W8A8"]
    assert {linear.projection for linear in static} == {*STATIC}
    assert all(histogram.scheme != "W8A8" for histogram in facts.scales)
    (role,) = (role for role in facts.roles if (role.role, role.scheme) == ("attention", "W8A8"))
    assert role.tensors == len([linear for linear in static if linear.role == "attention"])
    assert "static W8A8" in render(facts)


def test_scales_of_another_dtype(float_model: Path, tmp_path: Path) -> None:
    """bfloat16 scales are exact in the float64 in which they are counted."""

    def rounded(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            tensors[name] = tensors[name].bfloat16()

    facts = read_facts(write_modelslim(float_model, tmp_path / "model", edit=rounded))
    plain = read_facts(write_modelslim(float_model, tmp_path / "plain"))
    assert [histogram.channels for histogram in facts.scales] == [histogram.channels for histogram in plain.scales]


def test_compressed_tensors_is_no_artifact(float_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact of npuq's or ModelSlim's"):
        read_facts(write_compressed(float_model, tmp_path / "model"))
