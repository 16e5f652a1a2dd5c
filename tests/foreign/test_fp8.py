"""FP8 weights as compressed-tensors stores them, and as transformers reads them: npuq reads the values that both do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors import compress_module, decompress_module
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

import npuq
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights
from npuq.formats.sources.weights import WeightSource

ROWS, COLUMNS = 256, 384


def opened(directory: Path, tensors: dict[str, Tensor], quantization: object) -> WeightSource:
    (directory / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    return open_weights(Checkpoint.open(directory))


def extremes(weight: Tensor, strategy: QuantizationStrategy) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each part that has a scale."""
    if strategy == QuantizationStrategy.TENSOR:
        return weight.amin().reshape(1), weight.amax().reshape(1)
    if strategy == QuantizationStrategy.CHANNEL:
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    blocks = weight.view(ROWS // 128, 128, COLUMNS // 128, 128)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("preset", "form"),
    [("FP8", "F8_E4M3 by tensor"), ("FP8_DYNAMIC", "F8_E4M3 by channel"), ("FP8_BLOCK", "F8_E4M3 128x128")],
)
def test_values_are_those_of_compressed_tensors(preset: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    scheme = preset_name_to_scheme(preset, ["Linear"])
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).to(dtype)
    linear = nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.quantization_scheme = scheme
    scale, zero = calculate_qparams(*extremes(weight, scheme.weights.strategy), scheme.weights)
    linear.weight_scale = nn.Parameter(scale.to(dtype), requires_grad=False)
    linear.weight_zero_point = nn.Parameter(zero, requires_grad=False)
    compress_module(linear)
    tensors = {f"a.{name}": tensor.clone() for name, tensor in linear.state_dict().items()}
    scheme.format = linear.quantization_scheme.format
    config = QuantizationConfig(config_groups={"group_0": scheme}, format="float-quantized", ignore=[])
    source = opened(tmp_path, tensors, config.model_dump(mode="json"))
    assert source.weights["a.weight"].dtype == form
    decompress_module(linear)
    assert torch.equal(source.rows_float32("a.weight").to(dtype), linear.weight)


@pytest.mark.parametrize("code", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (32, 32)])
def test_values_are_those_of_transformers(code: torch.dtype, block: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator).to(torch.float8_e4m3fn)
    powers = torch.randint(-12, 3, (ROWS // block[0], COLUMNS // block[1]), generator=generator)
    scale = torch.exp2(powers.float()).to(code)
    config = {"quant_method": "fp8", "weight_block_size": list(block), "scale_fmt": "ue8m0"}
    source = opened(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, config)
    expected = Fp8Dequantize(None)._dequantize_one(weight, scale, torch.float32)
    assert torch.equal(source.rows_float32("a.weight"), expected)


def by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.float().abs().amax(1, keepdim=True) / 448).bfloat16()
    return (weight.float() / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def test_the_runtime_computes_with_its_values(
    float_model: Path, float_tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    """A whole model by channel, and the same values in float32."""
    stored, values = dict(float_tensors), dict(float_tensors)
    for name, weight in float_tensors.items():
        if "_proj" in name and "eh_proj" not in name:
            stored[name], scale = by_channel(weight)
            stored[f"{name}_scale"] = scale
            values[name] = stored[name].float() * scale.float()
    logits = []
    for kind, tensors in (("stored", stored), ("values", values)):
        directory = tmp_path / kind
        shutil.copytree(float_model, directory, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        logits.append(torch.cat(list(npuq.load(directory).logits([list(range(40, 60))]))))
    assert torch.equal(*logits)
