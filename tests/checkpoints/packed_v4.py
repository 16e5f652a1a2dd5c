"""DeepSeek-V4 as it is released: FP8 linears, FP4 experts, scales of powers of two, an MTP layer. Packed by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from deepseek_v4 import CONFIG, golden_model, release_tensors
from safetensors.torch import save_file
from torch import Tensor

from npuq.models.config import ModelConfig
from npuq.models.tensors import ModelTensors

# The OCP Microscaling formats (version 1.0), table 5: the magnitudes of E2M1 by their three bits.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
FP8_LINEARS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj", "main_proj")
QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
RELEASE: dict[str, Any] = {
    **CONFIG,
    "num_nextn_predict_layers": 1,
    "compress_ratios": [*CONFIG["compress_ratios"], 0],
    "expert_dtype": "fp4",
    "quantization_config": QUANTIZATION,
    "torch_dtype": "bfloat16",
}

# The release of 0731: a draft of three layers (DSpark) in place of the MTP layer.
BLOCK_DRAFT: dict[str, Any] = {
    **RELEASE,
    "num_nextn_predict_layers": 3,
    "compress_ratios": [*CONFIG["compress_ratios"], 0, 0, 0],
    "dspark_block_size": 5,
    "dspark_target_layer_ids": [1, 2, 3],
    "dspark_markov_rank": 16,
    "dspark_noise_token_id": 319,
}


def powers(largest: Tensor, most: float) -> Tensor:
    """The least power of two by which the largest magnitude is `most` at most, as E8M0 bytes."""
    exponent = torch.frexp(largest.clamp(min=1e-30) / most)[1]
    exact = torch.exp2(exponent - 1.0) * most >= largest
    return (exponent - exact.to(torch.int32) + 127).to(torch.uint8)


def pack_fp4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Bytes int8 [N, K / 2], E8M0 scales [N, K / 32], and the values float32 [N, K]."""
    groups = weight.float().unflatten(1, (-1, 32))
    scale = powers(groups.abs().amax(2), 6.0)
    unit = scale.view(torch.float8_e8m0fnu).float()[..., None]
    magnitudes = torch.tensor(E2M1)
    nearest = ((groups / unit).abs()[..., None] - magnitudes).abs().argmin(-1)
    sign = torch.signbit(groups)
    values = (magnitudes[nearest] * unit).where(~sign, -magnitudes[nearest] * unit).flatten(1)
    nibbles = (nearest + 8 * sign).flatten(1).to(torch.uint8)
    packed = (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(torch.int8)
    return packed.contiguous(), scale.view(torch.float8_e8m0fnu), values


def pack_fp8(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes F8_E4M3 [N, K], E8M0 scales of blocks of 128 by 128, and the values float32 [N, K]."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = powers(blocks.abs().amax((1, 3)), 448.0)
    unit = scale.view(torch.float8_e8m0fnu).float().repeat_interleave(128, 0).repeat_interleave(128, 1)
    unit = unit[:rows, :columns]
    codes = (weight.float() / unit).to(torch.float8_e4m3fn)
    return codes, scale.view(torch.float8_e8m0fnu), codes.float() * unit


def is_fp4(name: str) -> bool:
    return ".experts." in name


def is_fp8(name: str) -> bool:
    module = name.removesuffix(".weight")
    return module.rpartition(".")[2] in FP8_LINEARS and "compressor" not in name


def add_mtp(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """The release's MTP layer: a window alone, scored experts, its own projections, norms and connection."""
    hidden, last = config["hidden_size"], config["num_hidden_layers"] - 1
    for name in [name for name in tensors if name.startswith(f"layers.{last}.")]:
        if "compressor" not in name and "indexer" not in name:
            tensors["mtp.0." + name.split(".", 2)[2]] = tensors[name].flip(0).contiguous()
    generator = torch.Generator().manual_seed(5)
    for name in ("e_proj", "h_proj"):
        tensors[f"mtp.0.{name}.weight"] = torch.randn(hidden, hidden, generator=generator).bfloat16() / hidden**0.5
    for name in ("enorm", "hnorm", "norm"):
        tensors[f"mtp.0.{name}.weight"] = (1 + torch.randn(hidden, generator=generator) / 5).bfloat16()
    for name in ("fn", "base", "scale"):
        tensors[f"mtp.0.hc_head_{name}"] = tensors[f"hc_head_{name}"].flip(0).contiguous()


def write_release(directory: Path, config: dict[str, Any] = RELEASE) -> dict[str, Tensor]:
    """Write a tiny release; its values under the same names, in bfloat16 where they were packed, which is exact."""
    tensors = release_tensors(golden_model(config, torch.bfloat16), torch.bfloat16)
    if config["num_nextn_predict_layers"]:
        add_mtp(tensors, config)
    stored, values = {}, {}
    for name, tensor in tensors.items():
        pack = pack_fp4 if is_fp4(name) else pack_fp8 if is_fp8(name) else None
        if pack is None:
            stored[name] = values[name] = tensor
            continue
        stored[name], stored[name.removesuffix("weight") + "scale"], decoded = pack(tensor.float())
        values[name] = decoded.bfloat16()
        assert torch.equal(values[name].float(), decoded)
    write(directory, config, stored)
    return values


def write_random_release(directory: Path, config: dict[str, Any] = RELEASE) -> None:
    """Write a release of random weights without transformers."""
    generator = torch.Generator().manual_seed(9)
    model = ModelConfig.from_dict(config)
    layers = model.num_hidden_layers
    stored = {}
    for spec in ModelTensors(model).unroll(range(layers, layers + model.num_nextn_predict_layers)):
        name = spec.name
        if spec.optional:
            continue
        if spec.kept_dtype == "I64":
            stored[name] = torch.randint(0, model.n_routed_experts, spec.shape, generator=generator)
            continue
        drawn = torch.randn(spec.shape, generator=generator) / spec.shape[-1] ** 0.5
        if is_fp4(name) or is_fp8(name):
            pack = pack_fp4 if is_fp4(name) else pack_fp8
            stored[name], stored[name.removesuffix("weight") + "scale"], _ = pack(drawn)
        else:
            stored[name] = drawn if spec.kept_dtype else drawn.bfloat16()
    write(directory, config, stored)


def write_values(directory: Path, values: dict[str, Tensor], config: dict[str, Any] = RELEASE) -> None:
    """Write the values of a release as a plain bfloat16 checkpoint."""
    write(directory, {k: v for k, v in config.items() if k not in ("expert_dtype", "quantization_config")}, values)


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
