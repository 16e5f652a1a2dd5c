"""Rotation and smoothing reach the indexer: above the selection limit, transformers computes the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import text
from safetensors.torch import load_file, save_file
from sparse_models import MODELS, TOKENS, Sparse, logits, to_fp8_checkpoint
from torch import Tensor

from npuq.convert import CalibrationText, convert_checkpoint
from npuq.convert.calibrate.layers import experts, feed_forward, smooth

INDEXER = ["wk", "weights_proj", "wq_b"]


def error(found: Tensor, expected: Tensor) -> float:
    """The largest relative error of a token's logits."""
    return float(((found - expected).norm(dim=1) / expected.norm(dim=1)).max())


@pytest.fixture
def always_smooths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a strength that changes every channel, though nothing is quantized and no strength gains."""
    for module in (smooth, experts, feed_forward):
        monkeypatch.setattr(module, "least", lambda unchanged, trial, error, pool=None: (0.5, trial(0.5)))


def convert(source: Path, output: Path, method: str) -> dict[str, Tensor]:
    """Convert into a float artifact; return its tensors."""
    words = source.parent / "words.txt"
    words.write_text(text(2000))
    calibration = CalibrationText(words, 8, 8) if "smooth" in method else None
    convert_checkpoint(source, output, recipe="float", method=method, calibration=calibration)
    tensors: dict[str, Tensor] = {}
    for shard in output.glob("*.safetensors"):
        tensors |= load_file(shard)
    return tensors


@pytest.mark.parametrize("name", MODELS)
def test_a_rotated_and_smoothed_model_selects_the_same_tokens(
    name: str, sparse: Callable[..., Sparse], tmp_path: Path, always_smooths: None
) -> None:
    made = sparse(name)
    changed = convert(made.directory, tmp_path / "out", "rotate+smooth+mse")
    original = made.tensors
    assert all(
        (tensor - original[key]).abs().max() > 0.1
        for key, tensor in changed.items()
        if any(part in key for part in ("indexer.w", "input_layernorm", "q_a_layernorm"))
    )
    assert error(logits(tmp_path / "out"), logits(made.directory)) < 2e-3


@pytest.mark.parametrize("part", INDEXER)
@pytest.mark.parametrize("method", ["rotate", "smooth+mse"])
def test_an_indexer_left_as_it_was_selects_others(
    part: str, method: str, sparse: Callable[..., Sparse], tmp_path: Path, always_smooths: None
) -> None:
    """The test above fails without one of the rewrites. Below the limit nothing shows it."""
    made = sparse("v32")
    tensors = convert(made.directory, tmp_path / "out", method)
    for key, tensor in made.tensors.items():
        if f"indexer.{part}." in key:
            tensors[key] = tensor
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    save_file(tensors, shard, {"format": "pt"})
    assert error(logits(tmp_path / "out"), logits(made.directory)) > 0.05
    few = TOKENS[:, : made.config["index_topk"]]
    assert error(logits(tmp_path / "out", few), logits(made.directory, few)) < 2e-3


def test_what_a_layer_norm_reads_and_writes_is_not_turned(sparse: Callable[..., Sparse], tmp_path: Path) -> None:
    made = sparse("glm", mtp=True)
    tensors = convert(made.directory, tmp_path / "out", "rotate")
    norms = [name for name in tensors if "indexer.k_norm" in name]
    assert len(norms) == 2 * 3
    assert all(torch.equal(tensors[name], made.tensors[name]) for name in norms)


@pytest.mark.parametrize("name", ["v32", "glm"])
def test_an_fp8_release_is_what_its_dequantized_weights_are(
    name: str, sparse: Callable[..., Sparse], tmp_path: Path
) -> None:
    made: Any = sparse(name)
    to_fp8_checkpoint(made, tmp_path / "dequantized")
    assert made.tensors["model.layers.0.self_attn.indexer.wk.weight"].dtype is torch.float8_e4m3fn
    assert made.tensors["model.layers.0.self_attn.indexer.weights_proj.weight"].dtype is torch.float32
    convert(made.directory, tmp_path / "out", "rotate")
    assert error(logits(tmp_path / "out"), logits(tmp_path / "dequantized")) < 2e-3
