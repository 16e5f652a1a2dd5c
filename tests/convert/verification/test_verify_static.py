"""Linears with a static input scale (`W8A8`) in an artifact: verified value by value, and run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from damage import Artifact
from torch import Tensor

import npuq
from npuq.errors import ArtifactError
from npuq.formats.static_w8a8 import quantize_static
from npuq.quant.scales import Method

DESCRIPTION = "quant_model_description.json"
LAYER = "model.layers.1.self_attn"
Q_A, KV_A = f"{LAYER}.q_a_proj", f"{LAYER}.kv_a_proj_with_mqa"
RANGE = (-3.0, 4.0)


def make_static(artifact: Artifact, source: dict[str, Tensor], linear: str) -> None:
    """Turn a linear of an artifact into a static one, from its float weight."""
    made = quantize_static(source[f"{linear}.weight"].float(), *RANGE, Method.MINMAX).tensors
    artifact.edit_tensors(f"{linear}.weight", lambda tensors: tensors.update({f"{linear}.{k}": made[k] for k in made}))
    artifact.edit_json(DESCRIPTION, lambda content: content.update({f"{linear}.{suffix}": "W8A8" for suffix in made}))
    artifact.edit_json(
        "npuq/manifest.json", lambda content: content["linears"][f"{linear}.weight"].update({"scheme": "W8A8"})
    )
    artifact.edit_json("config.json", lambda content: content.pop("quantize", None))


@pytest.fixture(scope="module")
def pristine(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """An artifact whose first MoE layer has static q_a, kv_a, q_b and gate, up, down of the shared expert."""
    folder = tmp_path_factory.mktemp("static")
    kept: dict[str, Tensor] = {}
    write(folder / "source", edit=kept.update)
    npuq.convert_checkpoint(folder / "source", folder / "out", method="minmax")
    artifact = Artifact(folder / "out")
    shared = [f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
    for linear in (Q_A, KV_A, f"{LAYER}.q_b_proj", *shared):
        make_static(artifact, kept, linear)
    return artifact


@pytest.fixture
def artifact(pristine: Artifact, tmp_path: Path) -> Artifact:
    shutil.copytree(pristine.directory, tmp_path / "copy")
    return Artifact(tmp_path / "copy")


def test_it_is_sound_against_its_source(pristine):
    assert pristine.problems(pristine.directory.parent / "source") == ""


@pytest.mark.parametrize(
    ("suffix", "edit", "problem"),
    [
        ("weight", lambda t: t.flip(1) if t.flip(1).sum(1).ne(t.sum(1)).any() else t + 1, "quant_bias' disagrees"),
        ("quant_bias", lambda t: t + 1, "quant_bias' disagrees with the stored codes and input_offset"),
        ("input_offset", lambda t: t + 1, "quant_bias' disagrees"),
        ("input_offset", lambda t: t + 0.5, "is not a whole number"),
        ("input_scale", lambda t: t * 2, "deq_scale' is not input_scale"),
        ("input_scale", lambda t: -t, "is not a positive number"),
        ("deq_scale", lambda t: t * 1.0001, "deq_scale' is not input_scale"),
        ("deq_scale", lambda t: t * float("nan"), "deq_scale' is not input_scale"),
        ("deq_scale", lambda t: t.view(torch.int32).long(), "deq_scale' in "),
        ("weight_scale", lambda t: t * 1.0001, "deq_scale' is not input_scale"),
        ("weight_offset", lambda t: t + 1, "weight_offset' is not zero"),
        ("quant_bias", lambda t: t.float(), "quant_bias' in "),
        ("input_scale", lambda t: t.repeat(2), "input_scale' in "),
    ],
)
def test_each_tensor_is_checked_against_the_others(artifact, suffix, edit, problem):
    name = f"{Q_A}.{suffix}"
    if suffix == "weight":
        edit = lambda t: torch.where(t == 0, t + 1, t)  # noqa: E731
    artifact.edit_tensors(name, lambda tensors: tensors.update({name: edit(tensors[name]).contiguous()}))
    assert f"{Q_A}." in artifact.problems()
    assert problem in artifact.problems()


@pytest.mark.parametrize("suffix", ["input_scale", "input_offset", "deq_scale", "quant_bias", "weight_scale"])
def test_a_missing_tensor(artifact, suffix):
    artifact.edit_tensors(f"{Q_A}.{suffix}", lambda tensors: tensors.pop(f"{Q_A}.{suffix}"))
    assert f"tensor '{Q_A}.{suffix}' is missing: W8A8 needs it" in artifact.problems()


def test_fused_linears_share_their_input_scale(artifact):
    made = quantize_static(torch.randn(40, 64), -9.0, 9.0, Method.MINMAX).tensors
    artifact.edit_tensors(f"{KV_A}.weight", lambda tensors: tensors.update({f"{KV_A}.{k}": made[k] for k in made}))
    assert f"tensor '{KV_A}.input_scale' differs from '{Q_A}.input_scale': engines fuse them" in artifact.problems()
    with pytest.raises(ArtifactError, match="must share input_scale and input_offset"):
        npuq.load(artifact.directory)


def test_experts_cannot_be_static(artifact):
    expert = "model.layers.1.mlp.experts.0.up_proj.weight"
    artifact.edit_json(DESCRIPTION, lambda content: content.update({expert: "W8A8"}))
    assert "no loader has routed experts with a static input scale" in artifact.problems()


def test_a_damaged_input_scale_does_not_load(artifact):
    name = f"{Q_A}.input_scale"
    artifact.edit_tensors(name, lambda tensors: tensors.update({name: tensors[name] * 0}))
    with pytest.raises(ArtifactError, match=r"input_scale 0\.0 is not a positive number"):
        npuq.load(artifact.directory)
