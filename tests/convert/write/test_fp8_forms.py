"""Checkpoints in every form of FP8 convert to what their values convert to, verify against their source, and continue
after a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from npuq.convert import convert_checkpoint
from npuq.errors import CheckpointError
from npuq.report.facts import read_facts
from npuq.verification import inspect, verify

Tensors = dict[str, Tensor]
CT = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}


# A matrix as stored: the end of its scale's name, codes, scale, and the scale of each element.
Stored = tuple[str, Tensor, Tensor, Tensor]


def with_scale(weight: Tensor, scale: Tensor) -> Stored:
    return "_scale", (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale, scale.float()


def by_channel(weight: Tensor) -> Stored:
    return with_scale(weight, (weight.abs().amax(1, keepdim=True) / 448).bfloat16())


def by_channel_flat(weight: Tensor) -> Stored:
    suffix, codes, scale, spread = with_scale(weight, weight.abs().amax(1, keepdim=True) / 448)
    return suffix, codes, scale[:, 0], spread


def by_tensor(weight: Tensor) -> Stored:
    return with_scale(weight, (weight.abs().max() / 448).reshape(1))


def in_blocks(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Stored:
    """Blocks with powers of two as scales."""
    shape = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    padded = torch.zeros(shape[0] * rows, shape[1] * columns)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    largest = padded.reshape(shape[0], rows, shape[1], columns).abs().amax((1, 3))
    scale = torch.exp2((largest / 448).log2().ceil())
    spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: weight.shape[0], : weight.shape[1]]
    return "_scale_inv", (weight / spread).to(torch.float8_e4m3fn), scale.to(dtype), spread


FORMS: dict[str, tuple[Callable[[Tensor], Stored], dict[str, Any]]] = {
    "F8_E4M3 32x16 E8M0": (
        lambda weight: in_blocks(weight, 32, 16, torch.float8_e8m0fnu),
        {"quant_method": "fp8", "weight_block_size": [32, 16], "scale_fmt": "ue8m0"},
    ),
    "F8_E4M3 16x16": (
        lambda weight: in_blocks(weight, 16, 16, torch.float32),
        {"quant_method": "fp8", "weight_block_size": [16, 16], "scale_fmt": "ue8m0"},
    ),
    "F8_E4M3 by channel": (by_channel, CT),
    "F8_E4M3 by channel, one dimension": (by_channel_flat, CT),
    "F8_E4M3 by tensor": (by_tensor, {"quant_method": "fp8", "activation_scheme": "static"}),
}


@pytest.fixture(params=FORMS, scope="module")
def form(request: Any, write: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A checkpoint of a form, and one of its values in float32."""
    store, quantization = FORMS[request.param]
    values: Tensors = {}

    def quantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if "_proj" in name and "eh_proj" not in name]:
            suffix, tensors[name], tensors[name + suffix], spread = store(tensors[name].float())
            values[name] = tensors[name].float() * spread
            if quantization.get("activation_scheme") == "static":
                tensors[name.replace("weight", "input_scale")] = torch.ones(1)

    directory = tmp_path_factory.mktemp("form")
    source = write(directory / "source", edit=quantize, config={"quantization_config": quantization})
    plain = write(directory / "values", edit=lambda tensors: tensors.update(values))
    return request.param.partition(",")[0], source, plain


def shards(directory: Path) -> Tensors:
    tensors: Tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("method", ["mse", "rotate+mse"])
def test_it_converts_to_what_its_values_convert_to(form: tuple[str, Path, Path], method: str, tmp_path: Path) -> None:
    name, source, plain = form
    notes = convert_checkpoint(source, tmp_path / "out", method=method).notes
    assert not any("FP8 (" in note or "no weight is quantized" in note for note in notes)
    convert_checkpoint(plain, tmp_path / "expected", method=method)
    found, expected = shards(tmp_path / "out"), shards(tmp_path / "expected")
    assert found.keys() == expected.keys()
    for tensor, value in found.items():
        # What stays float is written in the model's dtype, rounded once.
        assert torch.equal(value, expected[tensor].to(value.dtype)), tensor
    assert verify(tmp_path / "out", source).problems == ()
    stored = json.loads((tmp_path / "out" / "npuq" / "manifest.json").read_text())["source"]
    assert stored["forms"][name] == 68 and set(stored["notes"]) <= set(notes)
    provenance = read_facts(tmp_path / "out").provenance
    assert f"68 {name}" in provenance["weights of the source"]
    assert provenance.get("notes on the source", "") == "; ".join(stored["notes"])
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {line.scheme for line in inspect(source).lines if line.role == "routed_expert"} == {name}


def test_it_continues_after_a_kill(form: tuple[str, Path, Path], rig: Any, tree: Any, tmp_path: Path) -> None:
    _, source, _ = form
    options = {"method": "minmax", "max_shard_size": 60_000}
    convert_checkpoint(source, tmp_path / "expected", **options)
    assert rig(source, tmp_path / "out", kill_at=300, options=options)["killed"]
    assert rig(source, tmp_path / "out", options=options)["summary"]["jobs_resumed"] > 0
    assert tree(tmp_path / "out") == tree(tmp_path / "expected")


@pytest.mark.parametrize("part", ["experts.1.up_proj", "kv_b_proj"])  # quantized, on the kernels where they run; float
def test_a_bad_scale_ends_the_conversion_in_one_line(part: str, form: tuple[str, Path, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(form[1], source)
    name, shard = next(
        (name, shard)
        for shard in sorted(source.glob("*.safetensors"))
        for name in load_file(shard)
        if part in name and "weight_scale" in name
    )
    tensors = load_file(shard)
    tensors[name] = torch.full(tensors[name].shape, float("nan")).to(tensors[name].dtype)
    save_file(tensors, shard)
    with pytest.raises(CheckpointError, match=f"{name}' holds a scale that is negative, infinite or NaN") as caught:
        convert_checkpoint(source, tmp_path / "out", method="minmax")
    assert "\n" not in str(caught.value)
