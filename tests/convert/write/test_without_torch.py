"""Conversion without calibration, and verification of its artifact, import no torch where the native kernels are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from npuq.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built here (no C compiler)")

WITHOUT_TORCH = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise AssertionError("torch is imported")

sys.meta_path.insert(0, Refused())
from npuq.cli.main import main
main()
"""


def _npuq(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("recipe", "method"), [("w4a8", "mse"), ("w8a8", "minmax"), ("float", "minmax")])
def test_convert_and_verify(recipe: str, method: str, v3_source: Path, tmp_path: Path) -> None:
    made = _npuq("convert", v3_source, tmp_path / "out", "--recipe", recipe, "--method", method, "--quiet")
    assert made.returncode == 0, made.stderr
    verified = _npuq("verify", tmp_path / "out", "--source", v3_source, "--quiet")
    assert verified.returncode == 0 and ": ok (" in verified.stdout, verified.stderr


def test_calibration_does_import_it(v3_source: Path, tmp_path: Path) -> None:
    """The refusal above refuses."""
    made = _npuq("convert", v3_source, tmp_path / "out", "--method", "rotate+mse", "--quiet")
    assert "torch is imported" in made.stderr
