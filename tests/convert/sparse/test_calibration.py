"""Calibration on samples longer than a selection: every layer attends to the tokens that the model selects."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import VOCABULARY, text
from sparse_models import MODELS, Sparse
from torch import Tensor

import npuq
from npuq.convert import CalibrationText, convert_checkpoint
from npuq.convert.calibrate import walk
from npuq.convert.calibrate.ranks.pool import RankedPool
from npuq.convert.calibrate.states import Streams
from npuq.convert.calibrate.texts import Calibration, read_calibration
from npuq.formats.artifact import KV_CACHE_NAME, MANIFEST_NAME

LENGTH = 40  # five selections


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(text(2000, vocabulary=VOCABULARY))
    return path


@pytest.fixture
def float_states(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The float model's hidden states after each layer of the next conversion."""
    states: list[Tensor] = []
    relative = walk._relative

    def record(pool: RankedPool, streams: Streams) -> float:
        states.append(streams.floats.clone())
        return relative(pool, streams)

    monkeypatch.setattr(walk, "_relative", record)
    return states


def golden_states(made: Sparse, tokens: Tensor) -> list[Tensor]:
    """transformers' hidden states after each layer but the last, which it normalises."""
    with torch.inference_mode():
        found = made.golden(tokens, output_hidden_states=True).hidden_states
    return [state.flatten(0, 1) for state in found[1:-1]]


def furthest(ours: list[Tensor], golden: list[Tensor]) -> float:
    """The largest relative error of a token in any layer."""
    return max(
        float(((a - b).norm(dim=1) / b.norm(dim=1)).max()) for a, b in zip(ours[: len(golden)], golden, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_float_model_selects_what_transformers_does(
    name: str,
    sparse: Callable[..., Sparse],
    words: Path,
    tmp_path: Path,
    float_states: list[Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made, calibration = sparse(name), CalibrationText(words, 6, LENGTH)
    convert_checkpoint(made.directory, tmp_path / "out", method="gptq", calibration=calibration)
    tokens = read_calibration(words, made.directory, VOCABULARY, 256, 6, LENGTH).tokens
    golden = golden_states(made, tokens)
    assert furthest(float_states, golden) < 1e-4
    assert npuq.verify(tmp_path / "out", made.directory).problems == ()
    # Sparse attention has no int8 KV cache: no scales for one, and no error of it.
    assert not (tmp_path / "out" / KV_CACHE_NAME).exists()
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    assert KV_CACHE_NAME not in manifest["files"]
    assert all("kv_cache_error" not in layer for layer in manifest["calibration"]["layers"].values())

    # With attention to all tokens, as up to the limit, the states are others.
    float_states.clear()
    monkeypatch.setattr(Calibration, "selected", lambda self, config: 0)
    convert_checkpoint(made.directory, tmp_path / "dense", method="gptq", calibration=calibration)
    assert furthest(float_states, golden) > 0.01


@pytest.mark.parametrize(("method", "attempts"), [("rotate+smooth+gptq", 2), ("auto", 1)])
def test_interrupted_it_starts_at_the_layer_that_selects(
    method: str, attempts: int, sparse: Callable[..., Sparse], words: Path, rig: Any, tree: Any, tmp_path: Path
) -> None:
    """Two of the four layers attend to another's selection, which is not kept."""
    made = sparse("glm", mtp=True)
    options = {"method": method, "calibration": [str(words), 20, LENGTH], "workers": 1}
    whole = rig(made.directory, tmp_path / "whole", options=options)
    assert whole["summary"]["status"] == "converted"
    draw = random.Random(method)
    for attempt in range(attempts):
        output = tmp_path / str(attempt)
        # How many calls a run makes depends on the syncer's turns: the last ones may be missing.
        assert rig(made.directory, output, options=options, kill_at=draw.randint(1, whole["calls"] * 4 // 5))["killed"]
        assert rig(made.directory, output, options=options | {"workers": 2})["summary"]["status"] != "planned"
        assert tree(output) == tree(tmp_path / "whole")
    manifest = json.loads((tmp_path / "whole" / "npuq" / "manifest.json").read_text())
    assert list(manifest["calibration"]["layers"]) == ["0", "1", "2", "3"]
    assert not (tmp_path / "whole" / "npuq" / "calibration").exists()
