"""The scripts of examples/ run, one after the other, as their docstrings say."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from page_commands import ROOT

sys.path.insert(0, str(ROOT / "tests/hub/rig"))
from loopback import LoopbackHub
from loopback_state import State

SOURCE, TEXT = ROOT / "examples/tiny-deepseek-v3-fp8", ROOT / "examples/eval.txt"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that examples/convert.py has made, by the example recipe."""
    output = tmp_path_factory.mktemp("examples") / "careful"
    with pytest.MonkeyPatch.context() as patch:
        run(patch, "convert.py", SOURCE, output, "--recipe", ROOT / "examples/recipe.yaml")
    return output


def run(patch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """Run an example as a program, in this process."""
    patch.setattr(sys, "argv", [name, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code


def test_convert_by_the_recipe_with_comments(built: Path) -> None:
    schemes = (built / "quant_model_description.json").read_text()
    assert '"model.layers.3.mlp.experts.0.up_proj.weight": "W8A8_DYNAMIC"' in schemes
    assert '"model.layers.2.mlp.experts.0.up_proj.weight": "W4A8_DYNAMIC"' in schemes


def test_evaluate(built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "evaluate.py", built, SOURCE, "--text", TEXT, "--characters", 3000)
    out = capsys.readouterr().out
    assert "KL divergence 0.00" in out and "layer 3: " in out


def test_generate(built: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "generate.py", built, "--tokens", 4)
    out = capsys.readouterr().out
    assert out.count("4 tokens, length: ") == 2 and "predicted tokens: -" in out


def test_calibrate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "calibrate.py", SOURCE, tmp_path, "--text", TEXT, "--samples", 2, "--length", 64)
    assert capsys.readouterr().out.count("KL to the source 0.00") == 2


def test_push(built: Path, tmp_path: Path) -> None:
    server = LoopbackHub(tmp_path / "objects").start()
    (tmp_path / "objects").mkdir()
    server.state = State(tmp_path / "objects")
    settings = {"HF_ENDPOINT": server.endpoint, "HF_TOKEN": "hf_writer", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, str(ROOT / "examples/push.py"), str(built), "alice/careful", str(tmp_path / "pulled")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=300)
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr
    assert "alice/careful: sent " in done.stdout and done.stdout.endswith("pulled: ok\n")
