"""Artifacts to report on."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import npuq

sys.path.append(str(Path(__file__).parent))
from report_support import CALIBRATION, EVALUATION, Manifest, edit_json


@pytest.fixture(scope="session")
def made_artifact(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "tiny-w4a8"
    npuq.convert_checkpoint(example_fp8, path, method="minmax")
    return path


@pytest.fixture
def artifact(made_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_artifact, tmp_path / made_artifact.name))


@pytest.fixture
def foreign(artifact: Path) -> Path:
    """The same weights as ModelSlim leaves them: with the description, without a manifest."""
    shutil.rmtree(artifact / "npuq")
    return artifact


@pytest.fixture
def calibrated(artifact: Path) -> Path:
    """With what calibration and evaluation add; expert 3 of layer 2 has no inputs, hence no output error."""

    def add(manifest: Manifest) -> None:
        manifest.update(calibration=CALIBRATION, evaluations=[EVALUATION], transforms=["rotate", "smooth"])
        for name, entry in manifest["linears"].items():
            if not name.startswith(("model.layers.2.mlp.experts.3.", "model.layers.4.")):
                entry["output_error"] = entry["relative_error"] / 2

    edit_json(artifact / "npuq/manifest.json", add)
    return artifact
