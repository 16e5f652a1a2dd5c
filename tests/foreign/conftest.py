"""Tests of what other tools have quantized. Their directories are written here as those tools write them, by code that
knows their formats and nothing of npuq's."""

import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

MODEL = HERE.parent.parent / "examples" / "tiny-deepseek-v3-fp8"


@pytest.fixture(scope="session")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint in bfloat16: what those tools start from. Read only."""
    import foreign

    return foreign.write_float(MODEL, tmp_path_factory.mktemp("float") / "model")


@pytest.fixture(scope="session")
def float_tensors(float_model: Path) -> dict[str, Tensor]:
    return load_file(float_model / "model.safetensors")
