"""Failures over ranks, in a program of a user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def on_two_ranks(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a program of this folder under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(Path(__file__).parent / program)]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_step_that_fails_on_a_follower_fails_on_all(example_fp8: Path, tmp_path: Path) -> None:
    ended = on_two_ranks("failing.py", example_fp8, tmp_path)
    # The program went on after the error of its step. It may end before its ranks are ended, or not.
    assert "Traceback" not in ended.stderr.partition("torch/distributed/elastic")[0]
    leader, follower = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert leader["settings"] == follower["settings"]
    assert leader["settings"][0] == "RankError"
    assert "do not have the same settings" in leader["settings"][1]
    assert follower["prompt"] == [
        "GenerationError",
        "rank 1 has no prompts of its own: it follows rank 0 (LanguageModel.follow)",
    ]
    assert follower["step"] == ["CheckpointError", "model-3.safetensors: became shorter"]
    assert leader["step"] == ["RankError", "rank 1: model-3.safetensors: became shorter"]
    assert leader["later"] == ["GenerationError", "an earlier step, or loading, has failed; start all ranks again"]


def test_ranks_end_with_a_program_that_does_not_close_them(example_fp8: Path, tmp_path: Path) -> None:
    """And a model that the followers would not load is refused."""
    ended = on_two_ranks("ending.py", "unclosed", example_fp8, tmp_path)
    assert ended.returncode == 0, ended.stderr
    late = (tmp_path / "rank-0").read_text(encoding="utf-8")
    assert late == "steps run already, and every model must be loaded before the first of them"
    assert (tmp_path / "rank-1").read_text(encoding="utf-8") == "returned"


def test_loading_that_fails_on_one_rank_ends_all(example_fp8: Path, tmp_path: Path) -> None:
    """Also where the program catches the error and lives on: the others wait in a collective."""
    ended = on_two_ranks("ending.py", "alone", example_fp8, tmp_path)
    assert ended.returncode != 0
    assert "npuq: error: rank 1: model-3.safetensors: became shorter" in ended.stderr.splitlines()


def test_a_model_that_one_rank_alone_loads_is_refused_on_all(example_fp8: Path, tmp_path: Path) -> None:
    on_two_ranks("ending.py", "uneven", example_fp8, tmp_path)
    said = [(tmp_path / f"rank-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert said[0] == said[1]
    assert said[0].startswith("some ranks load a model and others run steps already")
