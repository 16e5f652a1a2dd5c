"""What conversion does to grouped-query attention: source forms, schemes, biases, and keys that it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import npuq
from npuq.engines.placement import ENGINES, check_placement
from npuq.errors import CheckpointError, RecipeError, UnknownModelError
from npuq.models.config import ModelConfig

NAMES = ("qwen3-moe", "glm-4.5")
BLOCK = 32
STATIC = """
rules:
  - {names: [NAMES], scheme: W8A8_STATIC, layers: 0-2}
  - {layers: last 1, roles: [routed_expert], scheme: W8A8_DYNAMIC}
  - {roles: [routed_expert], scheme: W4A8_DYNAMIC}
  - {scheme: W8A8_DYNAMIC}
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("grouped")
    for name in NAMES:
        tiny.make_source(folder / name, name)
    return {name: folder / name for name in NAMES}


def described(directory: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / "quant_model_description.json").read_text())
    return found


def in_blocks(tensors: dict[str, Tensor], name: str) -> None:
    """As DeepSeek and Qwen publish: a scale for each block."""
    rows, columns = tensors[name].shape
    padded = torch.nn.functional.pad(tensors[name].float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448
    codes = (blocks / scale).flatten(2, 3).flatten(0, 1)[:rows, :columns]
    tensors[name] = codes.contiguous().to(torch.float8_e4m3fn)
    tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].bfloat16().contiguous()


def by_row(tensors: dict[str, Tensor], name: str) -> None:
    """As llm-compressor stores GLM-4.5's FP8 release: a scale for each output channel."""
    scale = tensors[name].float().abs().amax(1, keepdim=True) / 448
    tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
    tensors[name.removesuffix("weight") + "weight_scale"] = scale.bfloat16()


CLAIMS: dict[Any, dict[str, Any]] = {
    in_blocks: {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    by_row: {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel"}}},
    },
}


@pytest.mark.parametrize("form", [in_blocks, by_row])
@pytest.mark.parametrize("name", NAMES)
def test_sources_in_fp8(name: str, form: Any, sources: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources[name], source)
    tensors = load_file(source / "model.safetensors")
    biases = {key: tensor for key, tensor in tensors.items() if key.endswith("proj.bias")}
    assert bool(biases) == (name == "glm-4.5")
    for key in [key for key in tensors if key.endswith("_proj.weight") and "eh_proj" not in key]:
        form(tensors, key)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_config": CLAIMS[form]}))
    npuq.convert_checkpoint(source, tmp_path / "out", method="minmax")
    for against in (None, source):
        assert npuq.verify(tmp_path / "out", against).problems == ()
    types = described(tmp_path / "out")
    schemes = {types[key] for key in types if key.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))}
    assert schemes == {"W8A8_DYNAMIC"}
    assert {types[key] for key in types if key.endswith("mlp.gate.weight")} == {"FLOAT"}
    stored: dict[str, Tensor] = {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(shard)
    for key, bias in biases.items():
        assert types[key] == "FLOAT" and torch.equal(stored[key], bias)


def test_static_attention_and_the_last_layers_in_8_bits(sources: dict[str, Path], texts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(STATIC.replace("NAMES", "'*.self_attn.*_proj.weight'"))
    calibration = npuq.convert.CalibrationText(texts, 4, 32)
    npuq.convert_checkpoint(sources["qwen3-moe"], tmp_path / "out", recipe=recipe, calibration=calibration)
    assert npuq.verify(tmp_path / "out", sources["qwen3-moe"]).problems == ()
    types = described(tmp_path / "out")
    layer = "model.layers.{}.{}.weight".format
    assert {types[layer(2, f"self_attn.{part}_proj")] for part in "qkvo"} == {"W8A8"}
    experts = [types[layer(index, "mlp.experts.0.down_proj")] for index in range(3)]
    assert experts == ["W4A8_DYNAMIC", "W4A8_DYNAMIC", "W8A8_DYNAMIC"]
    for engine in ENGINES:
        assert check_placement(tmp_path / "out", engine, 1, False) == ()
    with pytest.raises(RecipeError, match=r"rule 1: W8A8 for .*_proj\.weight.*engines leave out the bias"):
        npuq.convert_checkpoint(sources["glm-4.5"], tmp_path / "glm", recipe=recipe, calibration=calibration)


@pytest.mark.parametrize("engine", ENGINES)
def test_ranks_that_share_or_repeat_two_key_heads(engine: str, sources: dict[str, Path], tmp_path: Path) -> None:
    npuq.convert_checkpoint(sources["glm-4.5"], tmp_path / "out", method="minmax")
    for ranks, fine in ((2, True), (4, True), (3, False)):
        told = [
            line for line in check_placement(tmp_path / "out", engine, ranks, True) if "key and value heads" in line
        ]
        assert bool(told) != fine, told


def test_an_unknown_type_built_alike(sources: dict[str, Path], tmp_path: Path) -> None:
    for name, family in zip(NAMES, ("qwen3_moe", "glm4_moe"), strict=True):
        source = tmp_path / name
        shutil.copytree(sources[name], source)
        config = json.loads((source / "config.json").read_text()) | {"model_type": "new_moe", "architectures": ["New"]}
        (source / "config.json").write_text(json.dumps(config))
        with pytest.raises(UnknownModelError, match=f"it looks like {family}.*--as {family}"):
            npuq.convert_checkpoint(source, tmp_path / "out", method="minmax")
        npuq.convert_checkpoint(source, tmp_path / f"{name}-out", method="minmax", family=family)
        assert npuq.verify(tmp_path / f"{name}-out").problems == ()


def test_the_artifact_says_what_transformers_5_calls_otherwise(sources: dict[str, Path], tmp_path: Path) -> None:
    npuq.convert_checkpoint(sources["qwen3-moe"], tmp_path / "qwen", method="minmax")
    assert "num_experts" not in json.loads((sources["qwen3-moe"] / "config.json").read_text())
    assert json.loads((tmp_path / "qwen" / "config.json").read_text())["num_experts"] == 16
    npuq.convert_checkpoint(sources["glm-4.5"], tmp_path / "glm", method="minmax")
    assert json.loads((tmp_path / "glm" / "config.json").read_text())["partial_rotary_factor"] == 0.5


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3-moe", {"num_key_value_heads": 3}, "cannot be shared by 3 num_key_value_heads"),
        ("qwen3-moe", {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ("qwen3-moe", {"use_sliding_window": True}, "use_sliding_window true is not supported"),
        ("qwen3-moe", {"attention_bias": True}, "attention_bias true is not supported"),
        ("qwen3-moe", {"partial_rotary_factor": 0.5}, "not read by the loaders of this family"),
        ("qwen3-moe", {"mlp_only_layers": [3]}, "whole numbers from 0 to 2"),
        ("qwen3-moe", {"mlp_only_layers": "0"}, "list of whole numbers"),
        ("qwen3-moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be at least 1"),
        ("qwen3-moe", {"num_experts_per_tok": 17}, "num_experts_per_tok 17 exceeds"),
        ("qwen3-moe", {"num_experts": 8}, "two names of one number"),
        ("glm-4.5", {"partial_rotary_factor": 0.25}, "0.25 and 0.5 at two places"),
        ("glm-4.5", {"rope_parameters": {"partial_rotary_factor": 0.3}}, "no whole number of channels"),
        ("glm-4.5", {"rope_parameters": {"partial_rotary_factor": 1 / 32}}, "1 rotary channels, which is odd"),
        ("glm-4.5", {"rope_parameters": {"partial_rotary_factor": "half"}}, "must be a finite number"),
        ("glm-4.5", {"rope_parameters": {"partial_rotary_factor": 2}}, "must be from 0 to 1"),
        ("glm-4.5", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not read"),
        (
            "glm-4.5",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 2,
                    "original_max_position_embeddings": 64,
                    "mscale": 1.0,
                }
            },
            "DeepSeek's models alone",
        ),
    ],
)
def test_keys_that_are_refused(name: str, changes: dict[str, Any], said: str, sources: dict[str, Path]) -> None:
    config = json.loads((sources[name] / "config.json").read_text())
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.from_dict({**config, **changes})
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_window_that_is_off_is_ignored(sources: dict[str, Path]) -> None:
    config = json.loads((sources["qwen3-moe"] / "config.json").read_text())
    assert (
        ModelConfig.from_dict({**config, "sliding_window": 4096, "use_sliding_window": False}).attention.kv_heads == 2
    )
