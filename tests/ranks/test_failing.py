"""Failures over ranks, in a program of a user's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_a_step_that_fails_on_a_follower_fails_on_all(example_fp8: Path, tmp_path: Path) -> None:
    program = Path(__file__).parent / "failing.py"
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ended = subprocess.run(
        [sys.executable, *launcher, str(program), str(example_fp8), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    # The program went on after the error of its step. It may end before its ranks are ended, or not.
    assert "Traceback" not in ended.stderr.partition("torch/distributed/elastic")[0]
    leader, follower = (json.loads((tmp_path / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert leader["settings"] == follower["settings"]
    assert leader["settings"][0] == "RankError"
    assert "do not load the same settings" in leader["settings"][1]
    assert follower["prompt"] == ["GenerationError", "rank 1 has no prompts of its own: it follows rank 0"]
    assert follower["step"] == ["CheckpointError", "model-3.safetensors: became shorter"]
    assert leader["step"] == ["RankError", "rank 1: model-3.safetensors: became shorter"]
    assert leader["later"] == ["GenerationError", "an earlier step has failed; start all ranks again"]
