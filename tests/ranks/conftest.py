"""Models to run over ranks, and where the helpers of these tests are found."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from int8_cache import copy_with_scales

import npuq
from npuq.cli.main import main

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / room) for room in ("families", "convert"))]


@pytest.fixture(scope="session")
def artifact(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint as a W4A8 artifact, by the fast method."""
    directory = tmp_path_factory.mktemp("artifact") / "w4a8"
    npuq.convert_checkpoint(example_fp8, directory, method="minmax", workers=1)
    return directory


@pytest.fixture(scope="session")
def int8_artifact(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with scales for an int8 KV cache."""
    return copy_with_scales(artifact, tmp_path_factory.mktemp("int8-cache") / "w4a8")


@pytest.fixture
def npuq_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["npuq", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as error:
            code = int(error.code or 0)
        out, err = capfd.readouterr()
        return code, out, err

    return call
