"""A file of rope tables: what is written comes back, and what kernels could not take is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from npuq.errors import ArtifactError
from npuq.formats.checkpoint import read_config
from npuq.formats.rope_file import load_rope, save_rope
from npuq.models.config import ModelConfig
from npuq.models.rope import RopeTables, rope_tables

YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 64, "mscale": 1.0, "mscale_all_dim": 1.0}
ROWS, PAIRS = 96, 32


@pytest.fixture
def config(example_fp8) -> ModelConfig:
    settings: dict[str, Any] = read_config(example_fp8)
    return ModelConfig.from_dict({**settings, "max_position_embeddings": ROWS, "rope_scaling": YARN})


@pytest.fixture
def tables(config: ModelConfig) -> RopeTables:
    return rope_tables(config)


def test_tables_survive_the_file(config: ModelConfig, tables: RopeTables, tmp_path: Path) -> None:
    path = tmp_path / "rope.safetensors"
    save_rope(tables, path)
    loaded = load_rope(path, config)
    assert np.array_equal(tables.cos, loaded.cos)
    assert np.array_equal(tables.sin, loaded.sin)
    assert (loaded.softmax_scale, dict(loaded.metadata)) == (tables.softmax_scale, dict(tables.metadata))


def test_tables_of_dynamic_ntk_are_longer(config: ModelConfig, example_fp8: Path, tmp_path: Path) -> None:
    settings = {**read_config(example_fp8), "max_position_embeddings": ROWS}
    dynamic = ModelConfig.from_dict({**settings, "rope_scaling": {"type": "dynamic", "factor": 2.5}})
    path = tmp_path / "rope.safetensors"
    save_rope(rope_tables(dynamic), path)
    assert load_rope(path, dynamic).cos.shape == (240, PAIRS)
    with pytest.raises(ArtifactError, match=r"'cos' is F32 \[240, 32\]; config.json says F32 \[96, 32\]"):
        load_rope(path, config)


def _of_cos(change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, "cos": change(tensors["cos"]).contiguous()}


def _poisoned(value: float) -> Callable[[Tensor], Tensor]:
    def poison(table: Tensor) -> Tensor:
        table = table.clone()
        table[50, 3] = value
        return table

    return poison


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "three dimensions": (_of_cos(lambda cos: cos[..., None]), r"'cos' is F32 \[96, 32, 1\]"),
    "one dimension": (_of_cos(lambda cos: cos.flatten()), r"'cos' is F32 \[3072\]"),
    "narrow": (_of_cos(lambda cos: cos[:, :1]), r"'cos' is F32 \[96, 1\]"),
    "wide": (_of_cos(lambda cos: cos.repeat(1, 2)), r"'cos' is F32 \[96, 64\]"),
    "short": (_of_cos(lambda cos: cos[:95]), r"'cos' is F32 \[95, 32\]"),
    "long": (_of_cos(lambda cos: cos.repeat(2, 1)), r"'cos' is F32 \[192, 32\]"),
    "no rows": (_of_cos(lambda cos: cos[:0]), r"'cos' is F32 \[0, 32\]"),
    "transposed": (_of_cos(lambda cos: cos.T), r"'cos' is F32 \[32, 96\]"),
    "half precision": (_of_cos(Tensor.half), r"'cos' is F16 \[96, 32\]"),
    "integers": (_of_cos(Tensor.int), r"'cos' is I32 \[96, 32\]"),
    "NaN": (_of_cos(_poisoned(torch.nan)), r"'cos' holds values that are not finite"),
    "infinity": (_of_cos(_poisoned(-torch.inf)), r"'cos' holds values that are not finite"),
    "no sin": (lambda tensors: {"cos": tensors["cos"]}, r"'sin' is missing"),
    "one too many": (lambda tensors: {**tensors, "tan": tensors["sin"].clone()}, r"'tan' does not belong there"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_table_that_no_kernel_could_take_is_refused(
    kind: str, config: ModelConfig, tables: RopeTables, tmp_path: Path
) -> None:
    change, message = DAMAGE[kind]
    path = tmp_path / "rope.safetensors"
    save_file(
        change({"cos": torch.from_numpy(tables.cos), "sin": torch.from_numpy(tables.sin)}),
        path,
        metadata=dict(tables.metadata),
    )
    with pytest.raises(ArtifactError, match=message) as caught:
        load_rope(path, config)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("scale", ["nan", "inf", "0.0", "-0.07", "1e-9", "1e4", "1e999", "", "a lot"])
def test_a_scale_that_attention_cannot_have_is_refused(
    scale: str, config: ModelConfig, tables: RopeTables, tmp_path: Path
) -> None:
    path = tmp_path / "rope.safetensors"
    save_rope(RopeTables(tables.cos, tables.sin, 1.0, {**tables.metadata, "softmax_scale": scale}), path)
    with pytest.raises(ArtifactError, match=f"softmax_scale {scale!r} is not near the"):
        load_rope(path, config)


def test_a_scale_is_needed(config: ModelConfig, tables: RopeTables, tmp_path: Path) -> None:
    save_rope(RopeTables(tables.cos, tables.sin, 1.0, {}), tmp_path / "rope.safetensors")
    with pytest.raises(ArtifactError, match="softmax_scale '' is not near the"):
        load_rope(tmp_path / "rope.safetensors", config)


def test_a_file_that_is_not_a_table_is_refused(config: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "rope.safetensors"
    with pytest.raises(ArtifactError, match="missing"):
        load_rope(path, config)
    path.mkdir()
    with pytest.raises(ArtifactError, match="not a regular file"):
        load_rope(path, config)
    path.rmdir()
    path.write_bytes(b"\x00" * 64)
    with pytest.raises(ArtifactError, match="malformed safetensors header"):
        load_rope(path, config)
