"""ModelSlim's own artifacts: opened, run, verified and converted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import npuq

STATIC = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")
PROMPT = list(range(40, 80))


@pytest.fixture(scope="module", params=["w4a8", "w8a8", "static", "legacy names"])
def directory(request: pytest.FixtureRequest, float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options: dict[str, Any] = {
        "w4a8": {},
        "w8a8": {"experts": "W8A8_DYNAMIC"},
        "static": {"static": STATIC},
        "legacy names": {"legacy_names": True},
    }[request.param]
    return foreign.write_modelslim(float_model, tmp_path_factory.mktemp("modelslim") / "model", **options)


@pytest.fixture(scope="module")
def converted(directory: Path) -> Path:
    npuq.convert_checkpoint(directory, directory.parent / "out", max_shard_size=4_000_000)
    return directory.parent / "out"


def weights_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def continuation(directory: Path) -> tuple[int, ...]:
    return npuq.load(directory).generate([PROMPT], max_new_tokens=12)[0].token_ids


def test_it_runs_and_is_sound(directory, float_model):
    report = npuq.verify(directory, float_model)
    renamed = not (directory / "quant_model_description.json").exists()
    assert [problem for problem in report.problems if "rename it, or run `npuq convert`" not in problem] == []
    assert (len(report.problems) == 1) == renamed
    assert report.linears == len(report.errors) > 200
    assert all(0 < error.relative_error < (0.2 if error.scheme == "W4A8_DYNAMIC" else 0.02) for error in report.errors)
    assert len(continuation(directory)) > 0


def test_converted_it_is_the_same_model_in_our_form(directory, converted, float_model):
    report = npuq.verify(converted, float_model)
    assert report.problems == ()
    assert npuq.verify(converted, directory).problems == ()
    assert continuation(converted) == continuation(directory)
    theirs, ours = weights_of(directory), weights_of(converted)
    for name, tensor in theirs.items():
        if name.endswith("scale_bias"):  # ours is rounded once
            np.testing.assert_allclose(ours[name].numpy(), tensor.numpy(), rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name
    added = {name.rpartition(".")[2] for name in ours.keys() - theirs.keys()}
    assert added <= {"weight_scale", "weight_offset"}
    description = json.loads((converted / "quant_model_description.json").read_text())
    assert description["ascend_quant_method"] == "ascend"
    assert set(ours) == {name for name in description if "." in name}
    manifest = json.loads((converted / "npuq" / "manifest.json").read_text())
    assert manifest["recipe"]["name"] == "stored"
    assert {linear["method"] for linear in manifest["linears"].values()} == {"stored"}
    assert {linear["relative_error"] for linear in manifest["linears"].values()} == {0.0}
    assert "codes and scales are as they were there" in (converted / "README.md").read_text()


def test_converted_again_it_does_not_change(converted, tmp_path):
    npuq.convert_checkpoint(converted, tmp_path / "again", max_shard_size=4_000_000)
    for path in converted.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_inspect_shows_schemes(directory):
    found = npuq.inspect(directory)
    assert found.kind == "quantized checkpoint" and found.recipe is None
    assert {line.scheme for line in found.lines if line.role == "routed_expert"} <= {"W4A8_DYNAMIC", "W8A8_DYNAMIC"}
    assert {line.scheme for line in found.lines if line.role == "attention"} <= {"W8A8_DYNAMIC", "W8A8"}
