"""The recipes of examples/: torchrun, and a job array's script with Slurm's variables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
OPTIONS = ["--method", "minmax", "--max-shard-size", "60000", "--workers", "1"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Run a script of examples/ with this environment's npuq and torchrun."""
    programs = tmp_path_factory.mktemp("bin")
    for name, module in (("torchrun", "torch.distributed.run"), ("npuq", "npuq")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "NODE"))}
    path = f"{programs}:{os.environ['PATH']}"
    environment = kept | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}

    def run(script: str, *arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
        line = ["bash", str(ROOT / "examples" / script), *map(str, arguments), *OPTIONS]
        return subprocess.run(line, capture_output=True, text=True, timeout=300, env=environment | variables)

    return run


def test_torchrun(shell, make_checkpoint, npuq, tmp_path, tree):
    """A rank's error names the rank and ends all; then the same line continues, and rank 0 alone prints."""

    def damage(tensors):
        name = "model.layers.2.mlp.experts.3.down_proj.weight"
        tensors[name] = torch.full_like(tensors[name], torch.nan)

    source, output = make_checkpoint(edit=damage), tmp_path / "out"
    with_port = {"RANKS_PER_NODE": "2", "PORT": "29517"}
    failed = shell("convert_torchrun.sh", source, output, **with_port)
    lines = [line for line in failed.stderr.splitlines() if "npuq: error:" in line]
    assert failed.returncode and len(lines) == 1 and "holds infinities or NaN" in lines[0]
    make_checkpoint()
    done = shell("convert_torchrun.sh", source, output, "--progress", "json", **with_port)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" weights") == 1 and done.stderr.count("finishing") == 1
    assert npuq("convert", source, tmp_path / "one", *OPTIONS).status == 0
    assert tree(output) == tree(tmp_path / "one")


def test_job_array(shell, v3_source, npuq, tmp_path, tree):
    output, job = tmp_path / "out", {"SLURM_JOB_ID": "7"}
    early = shell("convert.slurm", v3_source, output, "finish", **job)
    assert early.returncode == 1 and "no rank has begun it" in early.stderr
    for rank in "10":
        assert shell("convert.slurm", v3_source, output, 2, **job, SLURM_ARRAY_TASK_ID=rank).returncode == 0
    assert shell("convert.slurm", v3_source, output, "finish", **job).returncode == 0
    assert npuq("convert", v3_source, tmp_path / "one", *OPTIONS).status == 0
    assert tree(output) == tree(tmp_path / "one")
