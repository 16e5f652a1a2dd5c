"""GLM-4.7-Flash from end to end: transformers' checkpoint becomes an artifact that is sound and generates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import npuq
import npuq.runtime
from npuq.engines.placement import ENGINES, check_placement

PROMPT = torch.randint(2, 320, (30,), generator=torch.Generator().manual_seed(6)).tolist()


@pytest.fixture(scope="module")
def source(
    make_checkpoint: Callable[..., Any], example_fp8: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    directory = tmp_path_factory.mktemp("glm") / "source"
    golden = make_checkpoint(directory, "glm-flash")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example_fp8 / name, directory)
    return golden, directory


def error(ours: Tensor, golden: Any) -> float:
    """The median of all tokens' relative errors: rounding may route one of them to another expert."""
    with torch.inference_mode():
        expected: Tensor = golden(torch.tensor([PROMPT])).logits[0]
    return float(((ours.float() - expected).norm(dim=1) / expected.norm(dim=1)).median())


def test_rotated_floats_compute_what_transformers_does(source: tuple[Any, Path], tmp_path: Path) -> None:
    golden, directory = source
    npuq.convert_checkpoint(directory, tmp_path / "out", recipe="float", method="rotate")
    assert error(next(npuq.runtime.load(tmp_path / "out", "cpu").logits([PROMPT])), golden) < 1e-4


@pytest.mark.parametrize(("recipe", "most"), [("w8a8", 0.06), ("w4a8", 0.1)])
def test_an_artifact_is_sound_and_generates(source: tuple[Any, Path], recipe: str, most: float, tmp_path: Path) -> None:
    golden, directory = source
    out = tmp_path / "out"
    npuq.convert_checkpoint(directory, out, recipe=recipe, method="rotate+mse")
    verdict = npuq.verify(out, directory)
    assert verdict.problems == () and verdict.linears == 3 * 4 + 2 * 3 + 8 * 3 + 3
    for engine in ENGINES:
        assert check_placement(out, engine, 1, False) == ()
    config = json.loads((out / "config.json").read_text())
    # What transformers does not write, and the engines need.
    assert (config["first_k_dense_replace"], config["architectures"]) == (2, ["Glm4MoeLiteForCausalLM"])
    model = npuq.runtime.load(out, "cpu")
    assert error(next(model.logits([PROMPT])), golden) < most
    answer = model.generate(PROMPT, max_new_tokens=8, temperature=0, ignore_eos=True)
    tokens = [*PROMPT, *answer.token_ids]
    rows = next(model.logits([tokens]))[len(PROMPT) - 1 : -1]
    assert rows.argmax(-1).tolist() == list(answer.token_ids)
