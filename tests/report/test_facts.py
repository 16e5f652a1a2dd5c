"""The numbers of a report, against the manifest as written and against numpy over the stored scales."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import CALIBRATION, EVALUATION, edit_json
from safetensors.torch import load_file, save_file

from npuq.errors import ArtifactError, CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.safetensors import TensorInfo
from npuq.report import read_facts
from npuq.report.calibration import read_coverage
from npuq.report.linears import LinearFacts
from npuq.report.scale_histogram import BINS_PER_OCTAVE, scale_histograms
from npuq.verification import inspect

MANIFEST, REPORT = "npuq/manifest.json", "npuq/report.json"


def test_what_the_manifest_says(artifact: Path) -> None:
    facts, manifest = read_facts(artifact), json.loads((artifact / MANIFEST).read_text())
    assert {linear.name: linear.relative_error for linear in facts.linears} == {
        name: entry["relative_error"] for name, entry in manifest["linears"].items()
    }
    assert facts.source_bytes == manifest["totals"]["source_bytes"]
    with Checkpoint.open(artifact) as checkpoint:
        assert facts.output_bytes == sum(info.nbytes for info in checkpoint.tensors.values())
    assert [(role.role, role.scheme, role.output_bytes) for role in facts.roles] == [
        (line.role, line.scheme, line.output_bytes) for line in inspect(artifact).lines
    ]
    (expert,) = (x for x in facts.linears if x.name == "model.layers.4.mlp.experts.7.down_proj.weight")
    assert (expert.role, expert.layer, expert.expert, expert.projection) == ("mtp_routed_expert", 4, 7, "down_proj")
    (shared,) = (x for x in facts.linears if x.name == "model.layers.2.mlp.shared_experts.up_proj.weight")
    assert (shared.layer, shared.expert, shared.projection) == (2, None, "shared up_proj")
    assert facts.provenance["sha256 of its config.json"] == manifest["source"]["config_sha256"]
    assert "F8_E4M3 128x128" in facts.provenance["weights of the source"]
    assert facts.recipe == "w4a8"
    assert facts.recipe_yaml == (artifact / "npuq/recipe.yaml").read_text()
    assert facts.has_mtp
    assert max(linear.layer for linear in facts.linears) == facts.layers
    assert facts.coverage is None
    assert facts.evaluations == ()


def test_scales(artifact: Path) -> None:
    """Against numpy's histogram of every stored scale of the role."""
    types = json.loads((artifact / "quant_model_description.json").read_text())
    stored = {}
    for shard in artifact.glob("*.safetensors"):
        stored |= load_file(shard)
    facts = read_facts(artifact)
    for histogram in facts.scales:
        names = [
            x.name.removesuffix("weight") + "weight_scale"
            for x in facts.linears
            if (x.role, x.scheme) == (histogram.role, histogram.scheme)
        ]
        assert all(types[name] == histogram.scheme for name in names)
        scales = np.concatenate([stored[name].numpy().astype(np.float64).ravel() for name in names])
        edges = 2.0 ** (histogram.first + np.arange(len(histogram.counts) + 1) / BINS_PER_OCTAVE)
        assert list(histogram.counts) == np.histogram(scales, edges)[0].tolist()
        assert histogram.channels == scales.size
        assert histogram.counts[0] > 0
        assert histogram.counts[-1] > 0


@given(st.lists(st.floats(2.0**-126, 2.0**127, width=32), min_size=1, max_size=30))
def test_every_scale_is_counted_once(values: list[float]) -> None:
    class Stored(Checkpoint):
        def __init__(self) -> None:
            pass

        def info(self, name: str) -> TensorInfo:
            return TensorInfo(name, "F32", (len(values), 1), Path("a.safetensors"), 0, 4 * len(values))

        def read_array(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
            return np.array(values, np.float32)[:, None]

    linear = LinearFacts("a.weight", "attention", "W8A8_DYNAMIC", 0, None, "a", 0.1, None)
    (histogram,) = scale_histograms(Stored(), [linear, linear])
    assert histogram.channels == 2 * len(values)
    low, high = 2.0**histogram.first, 2.0 ** (histogram.first + len(histogram.counts) / BINS_PER_OCTAVE)
    assert low <= min(values) * (1 + 1e-12)
    assert max(values) <= high


def test_calibration_and_evaluation(calibrated: Path) -> None:
    facts = read_facts(calibrated)
    coverage = facts.coverage
    assert coverage is not None
    assert [layer.layer for layer in coverage.layers] == [0, 1, 2, 10]
    assert coverage.layers[0].expert_tokens == ()
    assert list(coverage.layers[2].expert_tokens) == CALIBRATION["layers"]["2"]["expert_tokens"]
    assert coverage.layers[2].fallbacks == {3: "data-free", 0: "blended"}
    assert coverage.layers[3].output_error == 0.041
    assert [layer.kv_cache_error for layer in coverage.layers] == [0.006, None, None, 0.007]
    assert coverage.layers[2].smoothing == {"input_layernorm": 0.25, "mlp.experts.down_proj": 0.0}
    assert facts.provenance["transforms"] == "rotate, smooth"
    errors = {linear.name: (linear.relative_error, linear.output_error) for linear in facts.linears}
    weight, output = errors[LINEAR]
    assert output == (weight or 0.0) / 2
    assert errors["model.layers.2.mlp.experts.3.up_proj.weight"][1] is None
    assert facts.evaluations == (EVALUATION,)
    as_json = json.loads(json.dumps(facts.as_dict(), allow_nan=False))
    assert as_json["coverage"]["layers"][2]["fallbacks"] == {"3": "data-free", "0": "blended"}


def test_no_manifest_but_a_description(made_artifact: Path, foreign: Path) -> None:
    """ModelSlim's: sizes and scales as npuq's own report of the same tensors has them, and nothing else."""
    own, facts = read_facts(made_artifact), read_facts(foreign)
    assert {(role.role, role.scheme, role.tensors, role.parameters, role.output_bytes) for role in facts.roles} == {
        (role.role, role.scheme, role.tensors, role.parameters, role.output_bytes) for role in own.roles
    }
    assert facts.output_bytes == own.output_bytes
    assert facts.source_bytes is None
    assert facts.scales == own.scales
    assert {linear.name for linear in facts.linears} == {linear.name for linear in own.linears}
    assert all(linear.relative_error is None for linear in facts.linears)
    assert (facts.recipe_yaml, facts.coverage, facts.evaluations, facts.provenance) == (None, None, (), {})


def test_no_artifact(example_fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no artifact of npuq's or ModelSlim's"):
        read_facts(example_fp8)
    with pytest.raises(CheckpointError, match="no such directory"):
        read_facts(tmp_path / "nothing")


def test_an_unfinished_artifact(artifact: Path) -> None:
    (artifact / MANIFEST).unlink()
    with pytest.raises(ArtifactError, match="no finished npuq artifact"):
        read_facts(artifact)


LINEAR = "model.layers.1.mlp.experts.0.up_proj.weight"
DAMAGE: dict[str, tuple[str, Callable[[Any], object]]] = {
    "no linears": (MANIFEST, lambda manifest: manifest.pop("linears")),
    "an unknown linear": (MANIFEST, lambda manifest: manifest["linears"].update({"a.weight": {}})),
    "an error that is no number": (MANIFEST, lambda manifest: manifest["linears"][LINEAR].update(relative_error="a")),
    "an error that is NaN": (MANIFEST, lambda manifest: manifest["linears"][LINEAR].update(relative_error=np.nan)),
    "an output error that is NaN": (MANIFEST, lambda manifest: manifest["linears"][LINEAR].update(output_error=np.nan)),
    "transforms that are a number": (MANIFEST, lambda manifest: manifest.update(transforms=3)),
    "layers that are no numbers": (MANIFEST, lambda manifest: manifest["architecture"].update(mtp_layers=["a"])),
    "no source": (MANIFEST, lambda manifest: manifest.update(source=None)),
    "no evaluations": (MANIFEST, lambda manifest: manifest.update(evaluations=3)),
    "no roles": (REPORT, lambda report: report.update(roles=None)),
    "a role without bytes": (REPORT, lambda report: report["roles"][0].pop("output_bytes")),
    "a role with an infinite error": (REPORT, lambda report: report["roles"][0].update(relative_error=np.inf)),
}


@pytest.mark.parametrize(("name", "change"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(artifact: Path, name: str, change: Callable[[Any], object]) -> None:
    edit_json(artifact / name, change)
    with pytest.raises(ArtifactError, match=f"{Path(name).name}: .*(damaged|no number)") as caught:
        read_facts(artifact)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [REPORT, "npuq/recipe.yaml"])
def test_a_missing_file_is_named(artifact: Path, name: str) -> None:
    (artifact / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        read_facts(artifact)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_that_cannot_be(artifact: Path, value: float) -> None:
    name = LINEAR + "_scale"
    for shard in artifact.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            tensors[name][0] = value
            save_file(tensors, shard)
    with pytest.raises(ArtifactError, match=f"'{name}' has a scale that is not positive and finite"):
        read_facts(artifact)


CALIBRATION_DAMAGE: dict[str, Callable[[Any], object]] = {
    "no tokens": lambda calibration: calibration.pop("tokens"),
    "layers are a list": lambda calibration: calibration.update(layers=[1]),
    "a layer's name": lambda calibration: calibration["layers"].update({"a": {}}),
    "a layer is a number": lambda calibration: calibration["layers"].update({"1": 3}),
    "fewer than no tokens": lambda calibration: calibration["layers"]["1"].update(expert_tokens=[-1]),
    "tokens are text": lambda calibration: calibration["layers"]["1"].update(expert_tokens=["many"]),
    "a fallback of no expert": lambda calibration: calibration["layers"]["1"].update(fallbacks={"16": "blended"}),
    "an unknown fallback": lambda calibration: calibration["layers"]["1"].update(fallbacks={"1": "float"}),
    "a strength that is text": lambda calibration: calibration["layers"]["1"].update(smoothing={"a": "strong"}),
    "a strength that is NaN": lambda calibration: calibration["layers"]["1"].update(smoothing={"a": np.nan}),
    "an error that is NaN": lambda calibration: calibration["layers"]["1"].update(output_error=np.nan),
    "a cache's error that is NaN": lambda calibration: calibration["layers"]["1"].update(kv_cache_error=np.nan),
    "a cache's error that is text": lambda calibration: calibration["layers"]["1"].update(kv_cache_error="small"),
}


@pytest.mark.parametrize("change", CALIBRATION_DAMAGE.values(), ids=CALIBRATION_DAMAGE.keys())
def test_damaged_calibration(change: Callable[[Any], object]) -> None:
    calibration = json.loads(json.dumps(CALIBRATION))
    change(calibration)
    with pytest.raises(ArtifactError, match="'calibration' is damaged"):
        read_coverage({"calibration": calibration})


def test_a_snapshot_without_weights(artifact: Path, tmp_path: Path) -> None:
    without = Path(shutil.copytree(artifact, tmp_path / "without"))
    next(iter(sorted(without.glob("*.safetensors")))).unlink()
    with pytest.raises(CheckpointError, match="safetensors"):
        read_facts(without)
