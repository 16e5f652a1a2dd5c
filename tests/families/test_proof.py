"""What every family has to show, on a tiny random model: its artifact is near transformers' logits, sound, whole, and
the same to the byte after any interruption and with any number of workers."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calibrated import CHAIN
from killable import Rig
from safetensors import safe_open
from torch import Tensor

import npuq
import npuq.runtime
from npuq.convert import CalibrationText
from npuq.engines.placement import ENGINES, check_placement

PROMPT = torch.randint(2, 320, (60,), generator=torch.Generator().manual_seed(6)).tolist()
WINDOWS, LENGTH = 24, 32
SHARD = 400_000  # bytes: several shards


# Calibrated or not: tests of what all conversions show.
every_family = pytest.mark.parametrize(
    "family", sorted({*tiny.FAMILIES, *tiny.PACKED, tiny.V4}), indirect=True, scope="session"
)


@dataclass(frozen=True)
class Converted:
    """The W4A8 artifact of the whole chain of methods, or of least squares for a family that is not calibrated.

    options: of the conversion, for the rig. calls: how often making it changed the disk.
    """

    golden: Any
    source: Path
    directory: Path
    options: dict[str, Any]
    calls: int


def options(family: str, texts: Path) -> dict[str, Any]:
    common = {"max_shard_size": SHARD, "workers": 1}
    if family == tiny.V4:
        return {"method": "mse", **common}
    return {"method": CHAIN, "calibration": [str(texts), WINDOWS, LENGTH], **common}


@pytest.fixture(scope="module")
def converted(
    family: str, family_pair: tuple[Any, Path], texts: Path, rig: Rig, tmp_path_factory: pytest.TempPathFactory
) -> Converted:
    golden, source = family_pair
    directory, chosen = tmp_path_factory.mktemp("artifact") / "w4a8", options(family, texts)
    answer = rig(source, directory, options=chosen)
    assert answer["summary"]["status"] == "converted"
    return Converted(golden, source, directory, chosen, answer["calls"])


def error(directory: Path, golden: Any) -> float:
    """The median of all tokens' relative errors: rounding may route one of them to another expert."""
    ours: Tensor = next(npuq.runtime.load(directory, "cpu").logits([PROMPT]))
    with torch.inference_mode():
        expected: Tensor = golden(torch.tensor([PROMPT])).logits[0]
    return float(((ours.float() - expected).norm(dim=1) / expected.norm(dim=1)).median())


def stored(directory: Path) -> dict[str, str]:
    """The dtype of every tensor, by the safetensors library."""
    found = {}
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    return found


def test_rotated_floats_compute_what_transformers_does(family: str, tmp_path: Path) -> None:
    golden = tiny.make_checkpoint(tmp_path / "source", family)
    npuq.convert_checkpoint(tmp_path / "source", tmp_path / "out", recipe="float", method="rotate")
    assert error(tmp_path / "out", golden) < 1e-4


def test_calibration_beats_least_squares(converted: Converted, tmp_path: Path) -> None:
    npuq.convert_checkpoint(converted.source, tmp_path / "mse", method="mse")
    chain, mse = error(converted.directory, converted.golden), error(tmp_path / "mse", converted.golden)
    print(f"chain {chain:.3f}, mse {mse:.3f}")
    assert chain < 0.9 * mse and chain < 0.35


@every_family
def test_the_artifact_is_sound_with_and_without_its_source(converted: Converted) -> None:
    integers = [name for name, dtype in stored(converted.directory).items() if dtype == "I8"]
    for source in (None, converted.source):
        verdict = npuq.verify(converted.directory, source)
        assert verdict.problems == ()
        assert verdict.linears == len(integers)


@every_family
def test_no_tensor_of_the_source_is_lost(converted: Converted) -> None:
    """MTP layers included, each described with its name."""
    description = json.loads((converted.directory / "quant_model_description.json").read_text())
    # A weight in int4 is three tensors.
    names = {
        name.removesuffix("_packed")
        for name in stored(converted.source)
        if not name.endswith(("weight_scale", "weight_shape", ".scale"))
    }
    assert names <= stored(converted.directory).keys()
    assert {name for name in names if "norm.bias" not in name} <= description.keys()


def test_both_engines_have_a_parameter_for_every_tensor(converted: Converted) -> None:
    for engine in ENGINES:
        problems = check_placement(converted.directory, engine, 1, False)
        # An old release builds an indexer in layers that share a selection.
        assert [line for line in problems if not line.startswith("vllm-ascend 0.23.0: layer")] == []


def test_it_generates_what_its_logits_say(converted: Converted) -> None:
    model = npuq.runtime.load(converted.directory, "cpu")
    answer = model.generate(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True)
    tokens = [*PROMPT, *answer.token_ids]
    rows = next(model.logits([tokens]))[len(PROMPT) - 1 : -1]
    assert rows.argmax(-1).tolist() == list(answer.token_ids)


@every_family
def test_killed_anywhere_it_continues_to_the_same_bytes(
    family: str, converted: Converted, rig: Rig, tree: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    """At another moment of each family's: one family is killed often in tests/convert."""
    # The syncer's calls depend on the time that a run takes: another run may have some fewer.
    kill_at = random.Random(family).randint(1, converted.calls * 3 // 4)
    assert rig(converted.source, tmp_path / "out", options=converted.options, kill_at=kill_at)["killed"]
    answer = rig(converted.source, tmp_path / "out", options={**converted.options, "workers": 2})
    assert answer["summary"]["status"] in ("converted", "finished")
    assert tree(tmp_path / "out") == tree(converted.directory)


@pytest.mark.parametrize("family", [tiny.V4], indirect=True, scope="session")
def test_interrupted_it_continues_to_the_same_bytes(
    converted: Converted, rig: Rig, tree: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    """From FP4; tests/convert has the other signals."""
    interrupt = [converted.calls // 2, int(signal.SIGINT)]
    answer = rig(converted.source, tmp_path / "out", options=converted.options, signal_at=interrupt)
    assert answer["exit_code"] == 130 and "run the same command to continue" in answer["error"]
    summary = rig(converted.source, tmp_path / "out", options=converted.options)["summary"]
    assert summary["jobs_resumed"] > 0
    assert tree(tmp_path / "out") == tree(converted.directory)


@every_family
def test_workers_and_memory_do_not_change_a_byte(
    converted: Converted, tree: Callable[[Path], dict[str, bytes]], tmp_path: Path
) -> None:
    more = {**converted.options, "workers": 3, "max_memory": 500_000_000}
    if "calibration" in more:
        more["calibration"] = CalibrationText(*more["calibration"])
    npuq.convert_checkpoint(converted.source, tmp_path / "out", **more)
    assert tree(tmp_path / "out") == tree(converted.directory)
