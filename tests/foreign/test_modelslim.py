"""ModelSlim's own artifacts: opened, run, verified and converted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import foreign
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import npuq
from npuq.cli.main import main
from npuq.convert.conversion import Internals
from npuq.convert.write.pipeline import Durability
from npuq.errors import ConversionError

STATIC = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")
PROMPT = list(range(40, 80))
EVAL = Path(__file__).parent.parent.parent / "examples" / "eval.txt"


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


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


DAMAGE: dict[str, tuple[Any, str]] = {
    "a stray shard": (
        lambda folder: save_file({"x": torch.zeros(1)}, folder / "stray.safetensors"),
        "stray.safetensors: not part of the artifact, but engines load every .safetensors in this folder",
    ),
    "a second description": (
        lambda folder: (folder / "my_quant_model_description.json").write_text("{}"),
        "my_quant_model_description.json: a second description",
    ),
    "a name that nothing has": (
        lambda folder: edit(
            next(folder.glob("quant_model_description*.json")), lambda types: types.update({"model.x.weight": "FLOAT"})
        ),
        "describes 'model.x.weight', which no shard has",
    ),
    "a quantization_config": (
        lambda folder: edit(folder / "config.json", lambda config: config.update(quantization_config={"a": 1})),
        "quantization_config is left",
    ),
    "a norm that is quantized": (
        lambda folder: edit(
            next(folder.glob("quant_model_description*.json")),
            lambda types: types.update({"model.norm.weight": "W8A8_DYNAMIC"}),
        ),
        "model.norm.weight",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_verify_says_the_same_of_npuqs_own_artifact_and_of_another_tools(what, directory, converted, tmp_path):
    """One implementation of each stage serves both."""
    change, line = DAMAGE[what]
    if what == "a stray shard" and not list(directory.glob("*.index.json")):
        pytest.skip("without an index a second shard is refused before")
    for artifact in (directory, converted):
        copy = Path(shutil.copytree(artifact, tmp_path / artifact.name))
        change(copy)
        assert any(line in problem for problem in npuq.verify(copy).problems), artifact


def weights_of(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def continuation(directory: Path) -> tuple[int, ...]:
    return npuq.load(directory).generate([PROMPT], max_new_tokens=12, temperature=0)[0].token_ids


def test_it_runs_and_is_sound(directory, float_model):
    verdict = npuq.verify(directory, float_model)
    renamed = not (directory / "quant_model_description.json").exists()
    assert [problem for problem in verdict.problems if "rename it, or run `npuq convert`" not in problem] == []
    assert (len(verdict.problems) == 1) == renamed
    assert verdict.linears == len(verdict.errors) > 200
    assert all(0 < error.relative_error < (0.2 if error.scheme == "W4A8_DYNAMIC" else 0.02) for error in verdict.errors)
    assert len(continuation(directory)) > 0


def test_converted_it_is_the_same_model_in_our_form(directory, converted, float_model):
    verdict = npuq.verify(converted, float_model)
    assert verdict.problems == ()
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
    assert found.kind == "quantized_checkpoint" and found.recipe is None
    assert {line.scheme for line in found.lines if line.role == "routed_expert"} <= {"W4A8_DYNAMIC", "W8A8_DYNAMIC"}
    assert {line.scheme for line in found.lines if line.role == "attention"} <= {"W8A8_DYNAMIC", "W8A8"}


def test_an_interrupted_conversion_continues(float_model, tmp_path):
    directory = foreign.write_modelslim(float_model, tmp_path / "in", static=STATIC)
    npuq.convert_checkpoint(directory, tmp_path / "whole", max_shard_size=4_000_000)
    fail_at = [40, 90, 200, 0]
    for limit in fail_at:
        count = itertools.count(1)

        def write(descriptor: int, data: Any, offset: int, count: Iterator[int] = count, limit: int = limit) -> int:
            if next(count) == limit:
                raise OSError(errno.ENOSPC, "No space left on device")
            return os.pwrite(descriptor, data, offset)

        internals = Internals(Durability(0.0, 1), write)
        options: dict[str, Any] = {"max_shard_size": 4_000_000, "internals": internals, "workers": 1}
        if limit:
            with pytest.raises(ConversionError, match="make room"):
                npuq.convert_checkpoint(directory, tmp_path / "out", **options)
        else:
            summary = npuq.convert_checkpoint(directory, tmp_path / "out", **options)
            assert summary.status == "converted" and summary.jobs_resumed > 0
    whole = {path.relative_to(tmp_path / "whole"): path for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    for name, path in whole.items():
        assert (tmp_path / "out" / name).read_bytes() == path.read_bytes(), name
    assert npuq.convert_checkpoint(directory, tmp_path / "out", max_shard_size=4_000_000).status == "finished"


def test_a_float16_model_keeps_its_bit_patterns(float_model, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    for path in float_model.glob("*.json"):
        (half / path.name).write_bytes(path.read_bytes())
    config = json.loads((half / "config.json").read_text()) | {"torch_dtype": "float16"}
    (half / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.half() for name, tensor in load_file(float_model / "model.safetensors").items()}
    save_file(tensors, half / "model.safetensors")
    directory = foreign.write_modelslim(half, tmp_path / "in", static=STATIC)
    npuq.convert_checkpoint(directory, tmp_path / "out")
    assert npuq.verify(directory).problems == npuq.verify(tmp_path / "out", half).problems == ()
    stored = weights_of(tmp_path / "out")["model.layers.0.self_attn.q_a_proj.deq_scale"]
    assert stored.dtype == torch.int64
    assert torch.equal(stored, weights_of(directory)["model.layers.0.self_attn.q_a_proj.deq_scale"])
    assert continuation(tmp_path / "out") == continuation(directory)


@dataclass(frozen=True)
class Ended:
    returncode: int
    stdout: str
    stderr: str


def test_the_command_line(float_model, tmp_path, monkeypatch, capsys):
    directory = foreign.write_modelslim(float_model, tmp_path / "in")
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
        status: object = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        said = capsys.readouterr()
        return Ended(int(status or 0), said.out, said.err)

    planned = run("convert", directory, tmp_path / "out", "--dry-run")
    assert planned.returncode == 0 and "W4A8_DYNAMIC" in planned.stdout and not (tmp_path / "out").exists()
    verified = run("verify", directory, "--engine", "vllm-ascend", "--tp", 4, "--ep", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["ok"]
    shown = run("inspect", directory)
    assert shown.stdout.startswith("quantized checkpoint: deepseek_v3, 4 layers, 16 experts\n")
    written = run("generate", directory, "--prompt", "Call me", "--max-new-tokens", 3)
    assert written.returncode == 0, written.stderr
    (tmp_path / "text").write_text(EVAL.read_text()[:800])
    evaluated = run("evaluate", directory, "--source", float_model, "--text", "text", "--context", 64, "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    (directory / "quant_model_weights.safetensors.index.json").write_text("{}")
    failed = run("convert", directory, tmp_path / "out")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1 and "weight_map" in failed.stderr
