"""A model whose files become shorter while it is in use gives an error, and no text of what is left."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from npuq.errors import CheckpointError
from npuq.native import mapped
from npuq.native.library import levels
from npuq.runtime import SamplingParams, layer_errors, load
from npuq.runtime.evaluation import layer_error

PROMPT = list(range(5, 45))
MESSAGE = r"model-00001-of-00001\.safetensors: became shorter while it was in use.* load the model again"


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def _cut(directory: Path) -> None:
    (shard,) = directory.glob("*.safetensors")
    os.truncate(shard, shard.stat().st_size // 3)


@pytest.mark.skipif(not levels(), reason="without the native library the process may end by SIGBUS")
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_between_steps(copy: Path, backend: str) -> None:
    model = load(copy, backend)
    model.engine.add(PROMPT, SamplingParams(max_new_tokens=5, ignore_eos=True))
    assert len(model.engine.step()) == 1
    _cut(copy)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=MESSAGE):
            model.engine.step()
    with pytest.raises(CheckpointError, match=MESSAGE):
        list(model.logits([PROMPT]))


def test_without_the_native_library_before_a_step(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "library", lambda: None)
    model = load(copy, "reference")
    model.engine.add(PROMPT, SamplingParams(max_new_tokens=5))
    _cut(copy)
    with pytest.raises(CheckpointError, match=MESSAGE):
        model.engine.step()


@pytest.mark.skipif(not levels(), reason="without the native library the process may end by SIGBUS")
def test_while_layers_are_compared(
    copy: Path, example_fp8: Path, eval_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_then_walk(*arguments: object) -> object:
        _cut(copy)
        return walk(*arguments)

    walk = layer_error._walk
    monkeypatch.setattr(layer_error, "_walk", cut_then_walk)
    with pytest.raises(CheckpointError, match=r"model-00001-of-00001\.safetensors"):
        layer_errors(copy, eval_text.read_text()[:2000], example_fp8, 64, "cpu")
