"""GLM-4.7-Flash's config.json: what transformers leaves out, and the places that releases write theta to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import npuq
import npuq.runtime

PROMPT = torch.randint(2, 320, (30,), generator=torch.Generator().manual_seed(6)).tolist()
THETA = 1000000.0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("glm") / "source"
    return tiny.make_checkpoint(directory, "glm-flash"), directory


def error(directory: Path, golden: Any) -> float:
    ours: Tensor = next(npuq.runtime.load(directory, "cpu").logits([PROMPT]))
    with torch.inference_mode():
        expected: Tensor = golden(torch.tensor([PROMPT])).logits[0]
    return float((ours.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": THETA}},
        {"rope_scaling": {"rope_type": "default", "rope_theta": THETA}},
        {"rope_scaling": {"type": "default", "rope_theta": THETA}},
        {"rope_theta": THETA, "rope_scaling": None},
    ],
)
def test_theta_is_read_wherever_a_release_has_it(
    source: tuple[Any, Path], rope: dict[str, Any], tmp_path: Path
) -> None:
    golden, directory = source
    shutil.copytree(directory, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    config = json.loads(path.read_text())
    assert "scoring_func" not in config and "first_k_dense_replace" not in config
    del config["rope_parameters"]
    path.write_text(json.dumps({**config, **rope}))
    assert error(tmp_path / "source", golden) < 1e-4


def test_the_artifact_says_what_transformers_leaves_out(source: tuple[Any, Path], tmp_path: Path) -> None:
    """And the engines need."""
    npuq.convert_checkpoint(source[1], tmp_path / "out", recipe="float", method="minmax")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["first_k_dense_replace"], config["architectures"]) == (2, ["Glm4MoeLiteForCausalLM"])
