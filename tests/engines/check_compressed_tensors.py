"""What compressed-tensors 0.18.0's own compressors make of weights becomes the artifact that the same codes make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.config import CompressionFormat
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    preset_name_to_scheme,
)
from compressed_tensors.quantization.utils import calculate_qparams
from engine_rig.models import EXAMPLE
from safetensors.torch import save_file
from torch import Tensor, nn

import npuq
from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.schemes import Scheme, dequantize, scale_bias
from npuq.formats.sources.opening import open_weights

EXPERTS = r"re:model\.layers\.[0-3]\.mlp\.experts\..*"
FLOAT = ("kv_b_proj", "eh_proj", "lm_head", "embed_tokens", "gate", "shared_head.head")


def scheme(bits: int, targets: list[str], form: CompressionFormat | None) -> QuantizationScheme:
    made = preset_name_to_scheme("W4A8" if bits == 4 else "W8A8", targets)
    weights = QuantizationArgs(num_bits=bits, strategy="channel", symmetric=True, dynamic=False)
    return QuantizationScheme(targets=targets, weights=weights, input_activations=made.input_activations, format=form)


def write(directory: Path, form: CompressionFormat | None) -> dict[str, Tensor]:
    """The shipped example as llm-compressor saves it; returns its linears as the library dequantizes them."""
    directory.mkdir()
    tensors: dict[str, Tensor] = {}
    worth: dict[str, Tensor] = {}
    groups = {"group_0": scheme(4, [EXPERTS], form), "group_1": scheme(8, ["Linear"], None)}
    ignore = []
    with Checkpoint.open(EXAMPLE) as checkpoint:
        source = open_weights(checkpoint)
        for name, weight in source.weights.items():
            rows, module = source.rows_float32(name), name.removesuffix(".weight")
            if len(weight.shape) != 2 or module.endswith(FLOAT):
                tensors[name] = rows if name.endswith("bias") else rows.bfloat16()
                ignore += [module] if len(weight.shape) == 2 else []
                continue
            four = ".mlp.experts." in name and int(name.split(".")[2]) < 4
            linear = nn.Linear(rows.shape[1], rows.shape[0], bias=False)
            linear.weight = nn.Parameter(rows.bfloat16(), requires_grad=False)
            linear.quantization_scheme = groups["group_0" if four else "group_1"].model_copy(deep=True)
            scale, zero = calculate_qparams(
                rows.amin(1, keepdim=True), rows.amax(1, keepdim=True), linear.quantization_scheme.weights
            )
            linear.weight_scale = nn.Parameter(scale.bfloat16(), requires_grad=False)
            linear.weight_zero_point = nn.Parameter(zero, requires_grad=False)
            compress_module(linear)
            groups["group_0" if four else "group_1"].format = linear.quantization_scheme.format
            tensors |= {f"{module}.{leaf}": tensor.data for leaf, tensor in linear.state_dict().items()}
            decompress_module(linear)
            worth[name] = linear.weight.data
    save_file(tensors, directory / "model.safetensors")
    for path in EXAMPLE.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, directory)
    config = json.loads((EXAMPLE / "config.json").read_text())
    quantization = QuantizationConfig(
        config_groups=groups,
        ignore=ignore,
        format=CompressionFormat.mixed_precision if form else CompressionFormat.int_quantized,
        quantization_status=QuantizationStatus.COMPRESSED,
    )
    config["quantization_config"] = quantization.model_dump(mode="json")
    (directory / "config.json").write_text(json.dumps(config))
    return worth


@pytest.mark.parametrize("form", [None, CompressionFormat.pack_quantized])
def test_it_becomes_the_same_model(tmp_path, form):
    worth = write(tmp_path / "theirs", form)
    described = json.loads((tmp_path / "theirs" / "config.json").read_text())["quantization_config"]
    assert described["config_groups"]["group_0"]["format"] == (form or CompressionFormat.int_quantized).value
    npuq.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    verdict = npuq.verify(tmp_path / "ours", EXAMPLE)
    assert verdict.problems == () and verdict.linears == len(worth)
    assert max(error.relative_error for error in verdict.errors) < 0.2
    with Checkpoint.open(tmp_path / "ours") as ours:
        for name, rows in worth.items():
            parts = {leaf: f"{name.removesuffix('weight')}{leaf}" for leaf in ("weight", "weight_scale", "scale_bias")}
            stored = {leaf: ours.read(part) for leaf, part in parts.items() if part in ours.tensors}
            kind = Scheme.W4A8 if "scale_bias" in stored else Scheme.W8A8
            assert torch.equal(dequantize(stored, kind).bfloat16(), rows), name


def test_codes_are_the_librarys_own(tmp_path):
    """Bytes and words of the same codes are read alike, and as the library itself reads them."""
    write(tmp_path / "bytes", None)
    write(tmp_path / "words", CompressionFormat.pack_quantized)
    for folder in ("bytes", "words"):
        npuq.convert_checkpoint(tmp_path / folder, tmp_path / f"{folder}-out")
    one, other = (Checkpoint.open(tmp_path / f"{folder}-out") for folder in ("bytes", "words"))
    theirs = Checkpoint.open(tmp_path / "bytes")
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert torch.equal(one.read(name).view(torch.uint8), other.read(name).view(torch.uint8)), name
    name = "model.layers.1.mlp.experts.3.down_proj"
    codes, scale = theirs.read(f"{name}.weight"), theirs.read(f"{name}.weight_scale").float()
    packed = one.read(f"{name}.weight").view(torch.uint8)
    assert torch.equal(codes[0::2].view(torch.uint8) & 15, packed & 15)
    assert torch.equal(codes[1::2].view(torch.uint8) & 15, packed >> 4)
    assert torch.equal(one.read(f"{name}.scale_bias"), scale_bias(codes, scale, 16))


def test_the_preset_is_by_group_and_refused(tmp_path):
    write(tmp_path / "theirs", None)
    path = tmp_path / "theirs" / "config.json"
    config = json.loads(path.read_text())
    preset = preset_name_to_scheme("W4A8", [EXPERTS]).model_dump(mode="json")
    config["quantization_config"]["config_groups"]["group_0"] = preset | {"format": "int-quantized"}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"group_0: weights by group of 128: only one scale a channel is read"):
        npuq.convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
