"""A form of storage that npuq has not got, added as `formats/sources/weights.py` says: planning, conversion, rotation
and the runtime take it through the protocol alone. int4 in groups of 32, as Kimi-K2-Thinking stores its experts."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import npuq
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.float_weights import float_weights
from npuq.formats.sources.weights import Weight, WeightSource
from npuq.quant.stored_rows import StoredRows

GROUP = 32
SHIFTS = torch.arange(0, 32, 4, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class GroupedInt4:
    """int32 [N, K/8] of eight codes a word, and bf16 [N, K/32]."""

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int]
    dtype: ClassVar[str] = "I4 in groups of 32"
    float_code: ClassVar[str] = "BF16"
    block_rows: ClassVar[int] = 1
    held_bytes: ClassVar[int] = 0
    linear: ClassVar[None] = None

    @property
    def stored_names(self) -> tuple[str, ...]:
        return (f"{self.name}_packed", f"{self.name}_scale")

    @property
    def nbytes(self) -> int:
        return sum(self.checkpoint.tensors[name].nbytes for name in self.stored_names)

    @property
    def file(self) -> Path:
        return self.checkpoint.tensors[self.stored_names[0]].file

    def rows(self, start: int = 0, stop: int | None = None) -> StoredRows:
        stop = self.shape[0] if stop is None else stop
        words, scale = (self.checkpoint.read_rows(name, start, stop) for name in self.stored_names)
        return StoredRows(dequantized(words, scale))

    def view(self) -> None:
        return None

    def row_bytes(self) -> None:
        return None


def dequantized(words: Tensor, scale: Tensor) -> Tensor:
    codes = ((words[:, :, None] >> SHIFTS & 15) - 8).flatten(1)
    return codes.float() * scale.float().repeat_interleave(GROUP, dim=1)


def open_grouped(checkpoint: Checkpoint) -> WeightSource:
    packed = {name.removesuffix("_packed"): name for name in checkpoint.tensors if name.endswith("_packed")}
    weights: dict[str, Weight] = {}
    for name, stored in packed.items():
        rows, words = checkpoint.tensors[stored].shape
        weights[name] = GroupedInt4(checkpoint, name, (rows, 8 * words))
    claimed = {stored for weight in weights.values() for stored in weight.stored_names}
    weights |= float_weights(checkpoint, [name for name in checkpoint.tensors if name not in claimed])
    # In the order of the float checkpoint: natural order of logical names.
    order = {name.removesuffix("_packed"): None for name in checkpoint.tensors}
    return WeightSource(checkpoint, {name: weights[name] for name in order if name in weights})


@pytest.fixture(scope="module")
def both(float_model: Path, float_tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A checkpoint with grouped experts, and another of the float32 values that they stand for."""
    grouped, values = {}, {}
    for name, weight in float_tensors.items():
        grouped[name] = values[name] = weight
        if ".mlp.experts." in name:
            del grouped[name]
            groups = weight.float().unflatten(1, (-1, GROUP))
            scale = (groups.abs().amax(2) / 7).bfloat16()
            codes = (groups / scale[:, :, None].float()).round().clamp(-8, 7).nan_to_num(0).flatten(1)
            words = ((codes.to(torch.int64) + 8).unflatten(1, (-1, 8)) << SHIFTS).sum(2)
            words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
            grouped |= {f"{name}_packed": words, f"{name}_scale": scale}
            values[name] = dequantized(words, scale)
    directories = []
    for kind, tensors in (("grouped", grouped), ("values", values)):
        directory = tmp_path_factory.mktemp("form") / kind
        shutil.copytree(float_model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        directories.append(directory)
    return directories


@pytest.mark.parametrize("method", ["mse", "rotate+mse"])
def test_it_converts_to_what_its_values_convert_to(
    both: list[Path], method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped, values = both
    npuq.convert_checkpoint(values, tmp_path / "expected", method=method)
    monkeypatch.setattr("npuq.convert.plan.prepare.open_weights", open_grouped)
    summary = npuq.convert_checkpoint(grouped, tmp_path / "out", method=method)
    assert summary.source_bytes < npuq.convert_checkpoint(values, tmp_path / "dry", dry_run=True).source_bytes
    expected = {path.name: path.read_bytes() for path in (tmp_path / "expected").glob("*.safetensors")}
    assert expected == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["moe_quantize"] == "w4a8_dynamic"


def test_the_runtime_computes_with_its_values(both: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    grouped, values = both
    tokens = [list(range(40, 60))]
    expected = torch.cat(list(npuq.load(values).logits(tokens)))
    monkeypatch.setattr("npuq.runtime.store.open_weights", open_grouped)
    assert torch.equal(torch.cat(list(npuq.load(grouped).logits(tokens))), expected)
