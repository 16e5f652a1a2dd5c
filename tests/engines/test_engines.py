"""Each engine's checks, in a subprocess of its own, on artifacts that are converted here."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import pytest
import torch
from ascend_rig.install import TORCH_NPU
from engine_rig.install import RELEASES, run_checks
from engine_rig.models import ARTIFACTS, write_artifact

pytestmark = pytest.mark.skipif(
    sys.version_info[:2] != (3, 11)
    or sys.platform != "linux"
    or platform.machine() != "x86_64"
    or not torch.__version__.startswith(TORCH_NPU),
    reason=f"the engines' wheels and the rig need CPython 3.11 on Linux x86-64 and torch {TORCH_NPU}",
)


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    for name in ARTIFACTS:
        write_artifact(name, folder)
    return folder


@pytest.mark.parametrize("release", RELEASES)
def test_checks_inside_the_engine(release, artifacts):
    done = run_checks(release, artifacts)
    assert done.returncode == 0, done.stdout + done.stderr
