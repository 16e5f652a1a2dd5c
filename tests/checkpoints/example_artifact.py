"""Fixtures of the shipped checkpoint's artifact, for the folders that run it. The Ascend rig has its own `artifact`."""

from __future__ import annotations

from pathlib import Path

import pytest
from int8_cache import copy_with_scales

import npuq


@pytest.fixture(scope="session")
def artifact(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint as a W4A8 artifact. The fast method: what is tested here is running it."""
    directory = tmp_path_factory.mktemp("artifact") / "w4a8"
    npuq.convert_checkpoint(example_fp8, directory, method="minmax", workers=1)
    return directory


@pytest.fixture(scope="session")
def int8_artifact(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with scales for an int8 KV cache."""
    return copy_with_scales(artifact, tmp_path_factory.mktemp("int8-cache") / "w4a8")
