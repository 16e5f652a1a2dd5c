"""Writes what ModelSlim and llm-compressor write, from a float checkpoint, with numpy and the safetensors library."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Edit = Callable[[Tensors], object]

# What stays float, by the end of the module's name.
FLOAT_MODULES = ("kv_b_proj", "eh_proj", "lm_head", "embed_tokens", "gate", "shared_head.head")
RANGE = (-4.0, 6.0)  # what activations of the static linears are said to have been


def write_float(source: Path, directory: Path) -> Path:
    """The FP8 checkpoint `source` in bfloat16, in one file."""
    stored: Tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        stored |= load_file(shard)
    tensors = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scale = stored[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            tensor = (tensor.float() * scale[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
        tensors[name] = tensor.contiguous()
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    for path in source.glob("*.json"):
        if not path.name.endswith("index.json"):
            shutil.copy(path, directory)
    config = json.loads((source / "config.json").read_text())
    del config["quantization_config"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def is_linear(name: str) -> bool:
    module = name.removesuffix(".weight")
    return name.endswith(".weight") and "norm" not in name and not module.endswith(FLOAT_MODULES)


def is_expert(name: str, layers: int) -> bool:
    return ".mlp.experts." in name and int(name.split(".")[2]) < layers


def codes_of(weight: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N, K] and float32 [N, 1]: the largest weight of a row on the largest code."""
    rows = weight.float().numpy()
    scale = (np.abs(rows).max(1, keepdims=True) / np.float32(2 ** (bits - 1) - 1)).astype(np.float32)
    return np.clip(np.rint(rows / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.int64), scale


def tensor(array: np.ndarray, dtype: type) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array.astype(dtype)))


# ---- ModelSlim -------------------------------------------------------------------------------------------------------


def write_modelslim(
    source: Path,
    directory: Path,
    *,
    experts: str = "W4A8_DYNAMIC",
    static: tuple[str, ...] = (),
    legacy_names: bool = False,
    shards: int = 3,
    edit: Edit | None = None,
    edit_types: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """The checkpoint `source` as msmodelslim 26.1 saves it; linears whose names end in one of `static` as W8A8.

    `legacy_names`: one file and a description that carry the type in their names, as earlier releases saved.
    """
    config = json.loads((source / "config.json").read_text())
    tensors: Tensors = {}
    types: dict[str, Any] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not is_linear(name):
            made, kind = {name: weight}, "FLOAT"
        else:
            kind = experts if is_expert(name, config["num_hidden_layers"]) else "W8A8_DYNAMIC"
            kind = "W8A8" if name.removesuffix(".weight").endswith(static or ("nothing",)) else kind
            made = modelslim_linear(name, weight, kind, float16=config["torch_dtype"] == "float16")
        tensors |= made
        types |= dict.fromkeys(made, kind)
    types |= {"version": "1.0.0", "model_quant_type": "W8A8_DYNAMIC", "metadata": {}, "group_size": 0, "optional": {}}
    if edit is not None:
        edit(tensors)
    if edit_types is not None:
        edit_types(types)
    directory.mkdir(parents=True)
    for path in source.glob("*.json"):
        shutil.copy(path, directory)
    if legacy_names:
        (directory / "quant_model_description_w8a8_dynamic.json").write_text(json.dumps(types))
        save_file(tensors, directory / "quant_model_weight_w8a8_dynamic.safetensors")
        return directory
    (directory / "quant_model_description.json").write_text(json.dumps(types, indent=4))
    write_shards(tensors, directory, "quant_model_weights", shards)
    return directory


def modelslim_linear(name: str, weight: Tensor, kind: str, *, float16: bool) -> Tensors:
    prefix = name.removesuffix("weight")
    codes, scale = codes_of(weight, 4 if kind == "W4A8_DYNAMIC" else 8)
    beside = {
        "weight": tensor(codes, np.int8),
        "weight_scale": tensor(scale, np.float32),
        "weight_offset": tensor(0 * scale, np.float32),
    }
    if kind == "W4A8_DYNAMIC":
        nibbles = codes & 15
        beside["weight"] = tensor(nibbles[0::2] | nibbles[1::2] << 4, np.uint8).view(torch.int8)
        products = codes.astype(np.float32) * scale
        slices = 16 if "down_proj" in name else 1
        beside["scale_bias"] = tensor(8 * products.reshape(len(codes), slices, -1).sum(2), np.float32)
    elif kind == "W8A8":
        low, high = RANGE
        input_scale = np.float32(high / 255 - low / 255)
        offset = np.float32(np.rint(-low / input_scale) - 128)
        deq_scale = (input_scale * scale[:, 0]).astype(np.float32)
        beside = {
            "weight": beside["weight"],
            "quant_bias": tensor(-codes.sum(1) * offset, np.int32),
            "input_scale": torch.tensor([float(input_scale)]),
            "input_offset": torch.tensor([float(offset)]),
            "deq_scale": tensor(deq_scale.view(np.int32), np.int64) if float16 else tensor(deq_scale, np.float32),
        }
    return {prefix + suffix: made for suffix, made in beside.items()}


# ---- llm-compressor --------------------------------------------------------------------------------------------------


def write_compressed(
    source: Path,
    directory: Path,
    *,
    bits: int = 4,
    packed: bool = False,
    edit: Edit | None = None,
    edit_config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """The checkpoint `source` as compressed-tensors: experts of `bits` bits, other linears of 8, scales in bfloat16."""
    config = json.loads((source / "config.json").read_text())
    tensors: Tensors = {}
    ignore = []
    for name, weight in load_file(source / "model.safetensors").items():
        prefix, module = name.removesuffix("weight"), name.removesuffix(".weight")
        if not is_linear(name):
            tensors[name] = weight
            ignore += [module] if module.endswith(FLOAT_MODULES) else []
            continue
        four = bits == 4 and is_expert(name, config["num_hidden_layers"])
        codes, scale = codes_of(weight, 4 if four else 8)
        tensors[prefix + "weight_scale"] = torch.from_numpy(scale).bfloat16()
        if four and packed:
            words = (codes + 8).reshape(len(codes), -1, 8) << np.arange(0, 32, 4)
            tensors[prefix + "weight_packed"] = tensor(words.sum(2), np.uint32).view(torch.int32)
            tensors[prefix + "weight_shape"] = torch.tensor(codes.shape)
        else:
            tensors[prefix + "weight"] = tensor(codes, np.int8)
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "int-quantized",
        "ignore": ignore,
        "config_groups": {"group_0": _group(["Linear"], 8, "int-quantized")},
    }
    if bits == 4:
        layers = config["num_hidden_layers"] - 1
        pattern = f"re:model\\.layers\\.[0-{layers}]\\.mlp\\.experts\\..*"
        form = "pack-quantized" if packed else "int-quantized"
        config["quantization_config"]["config_groups"]["group_1"] = _group([pattern], 4, form)
    if edit is not None:
        edit(tensors)
    if edit_config is not None:
        edit_config(config["quantization_config"])
    directory.mkdir(parents=True)
    for path in source.glob("*.json"):
        shutil.copy(path, directory)
    (directory / "config.json").write_text(json.dumps(config))
    write_shards(tensors, directory, "model", 2)
    return directory


def _group(targets: list[str], bits: int, form: str) -> dict[str, Any]:
    common = {"type": "int", "symmetric": True, "group_size": None, "actorder": None, "observer": "minmax"}
    return {
        "targets": targets,
        "format": form,
        "weights": {**common, "num_bits": bits, "strategy": "channel", "dynamic": False},
        "input_activations": {**common, "num_bits": 8, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }


def write_shards(tensors: Mapping[str, Tensor], directory: Path, prefix: str, count: int) -> None:
    names = list(tensors)
    placed = {}
    for number in range(count):
        shard = f"{prefix}-{number + 1:05d}-of-{count:05d}.safetensors"
        part = names[number * len(names) // count : (number + 1) * len(names) // count]
        save_file({name: tensors[name] for name in part}, directory / shard)
        placed |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": placed}
    (directory / f"{prefix}.safetensors.index.json").write_text(json.dumps(index))
