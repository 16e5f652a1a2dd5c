"""Checkpoints and artifacts to run, and each set of operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from int8_cache import copy_with_scales

import npuq
import npuq.runtime
from npuq.cli.main import main
from npuq.runtime.backend import make_ops
from npuq.runtime.ops import Ops
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.reference import ReferenceOps

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("families", "convert")]

from tiny import make_checkpoint as make_tiny_checkpoint  # noqa: E402


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Any]:
    """`make_checkpoint(directory, family, **config changes)`: a random checkpoint, and transformers' model of it."""
    return make_tiny_checkpoint


@pytest.fixture(scope="session")
def artifact(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint as a W4A8 artifact. The fast method: what is tested here is running it."""
    directory = tmp_path_factory.mktemp("artifact") / "w4a8"
    npuq.convert_checkpoint(example_fp8, directory, method="minmax", workers=1)
    return directory


@pytest.fixture(scope="module")
def example(example_fp8: Path) -> npuq.runtime.LanguageModel:
    """The shipped checkpoint, loaded."""
    return npuq.runtime.load(example_fp8, "cpu")


@pytest.fixture(scope="session")
def int8_artifact(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with scales for an int8 KV cache."""
    return copy_with_scales(artifact, tmp_path_factory.mktemp("int8-cache") / "w4a8")


# The last runs on native kernels where they are built.
OPERATOR_SETS: dict[str, Callable[[], Ops]] = {
    "reference": ReferenceOps,
    "torch": CpuOps,
    "cpu": lambda: make_ops("cpu"),
}


@pytest.fixture(scope="session", params=OPERATOR_SETS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """Each CPU set of operators, in float32."""
    return OPERATOR_SETS[request.param]()
