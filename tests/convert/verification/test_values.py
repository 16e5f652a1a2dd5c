"""What an artifact holds, read by the safetensors library and recomputed with numpy from the source files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from npuq.convert import convert_checkpoint


def load_all(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every safetensors file in the root, whatever the index says."""
    tensors = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def load_source(directory: Path, block: int) -> dict[str, np.ndarray]:
    """Source weights in float64, FP8 blocks multiplied out with numpy."""
    stored = load_all(directory)
    weights = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv"):
            continue
        values = tensor.to(torch.float32).numpy().astype(np.float64)
        if name + "_scale_inv" in stored:
            scale = stored[name + "_scale_inv"].numpy().astype(np.float64)
            spread = np.repeat(np.repeat(scale, block, 0), block, 1)[: values.shape[0], : values.shape[1]]
            values = values * spread
        weights[name] = values
    return weights


def unpack(packed: np.ndarray) -> np.ndarray:
    """Codes [N, K] of bytes [N/2, K]: even rows in the low nibble, odd rows in the high one, two's complement."""
    low = (packed.astype(np.int16) & 15) ^ 8
    high = packed.astype(np.int16) >> 4
    codes = np.empty((2 * packed.shape[0], packed.shape[1]), np.int64)
    codes[0::2], codes[1::2] = low - 8, high
    return codes


@pytest.fixture(scope="module")
def stored(v3_artifact: Path) -> dict[str, Tensor]:
    return load_all(v3_artifact)


@pytest.fixture(scope="module")
def source(v3_source: Path) -> dict[str, np.ndarray]:
    return load_source(v3_source, 16)


@pytest.fixture(scope="module")
def description(v3_artifact: Path) -> dict[str, str]:
    return dict(json.loads((v3_artifact / "quant_model_description.json").read_text()))


def test_routed_experts_are_packed_int4_with_their_scales_and_biases(stored, source, description):
    names = [n for n in source if ".experts." in n and ".layers.3." not in n]
    assert len(names) == 2 * 4 * 3
    for name in names:
        weight, prefix = source[name], name.removesuffix("weight")
        n, k = weight.shape
        assert stored[name].dtype == torch.int8 and stored[name].shape == (n // 2, k)
        codes = unpack(stored[name].numpy())
        scale = stored[prefix + "weight_scale"].numpy()
        assert scale.dtype == np.float32 and scale.shape == (n, 1)
        np.testing.assert_allclose(scale[:, 0], np.abs(weight).max(1) / 7, rtol=1e-6)
        # Each code is the nearest one; ties and float32 division may go either way.
        assert (np.abs(weight / scale - codes) <= 0.5 + 1e-4).all()
        columns = 16 if "down_proj" in name else 1
        bias = (8 * codes.reshape(n, columns, -1).sum(2)).astype(np.float32) * scale
        np.testing.assert_array_equal(stored[prefix + "scale_bias"].numpy(), bias)
        np.testing.assert_array_equal(stored[prefix + "weight_offset"].numpy(), np.zeros((n, 1), np.float32))
        assert {description[prefix + s] for s in ("weight", "weight_scale", "weight_offset", "scale_bias")} == {
            "W4A8_DYNAMIC"
        }


def test_other_linears_are_int8(stored, source, description):
    names = [
        n
        for n in source
        if "_proj" in n and "kv_b" not in n and "eh_proj" not in n and (".experts." not in n or ".layers.3." in n)
    ]
    assert len(names) == 4 * 4 + 3 + 3 * 3 + 4 * 3  # attention, dense, shared, MTP experts
    for name in names:
        weight, prefix = source[name], name.removesuffix("weight")
        scale = stored[prefix + "weight_scale"].numpy()
        codes = stored[name].numpy()
        assert codes.dtype == np.int8 and codes.shape == weight.shape
        np.testing.assert_allclose(scale[:, 0], np.abs(weight).max(1) / 127, rtol=1e-6)
        assert (np.abs(weight / scale - codes) <= 0.5 + 2e-3).all()
        assert not stored[prefix + "weight_offset"].any()
        assert prefix + "scale_bias" not in stored
        assert description[name] == description[prefix + "weight_scale"] == "W8A8_DYNAMIC"


def test_what_must_stay_float_does(stored, source, description):
    kept = [n for n in source if description[n] == "FLOAT"]
    assert any("kv_b_proj" in n for n in kept) and any("e_score_correction_bias" in n for n in kept)
    assert {n for n in source if "_proj" not in n} <= set(kept)
    for name in kept:
        expected = torch.float32 if "e_score_correction_bias" in name else torch.bfloat16
        assert stored[name].dtype == expected
        rounded = torch.from_numpy(source[name]).to(torch.float32).to(expected)
        assert torch.equal(stored[name], rounded), name


def test_description_and_index_are_complete_both_ways(v3_artifact, stored, description):
    described = {name for name in description if "." in name}
    index = json.loads((v3_artifact / "model.safetensors.index.json").read_text())
    assert described == set(stored) == set(index["weight_map"])
    for name, shard in index["weight_map"].items():
        with safe_open(v3_artifact / shard, "pt") as file:
            assert name in file.keys()  # noqa: SIM118
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert {k: v for k, v in description.items() if "." not in k} == {
        "version": "1.0.0",
        "model_quant_type": "W8A8_DYNAMIC",
        "group_size": 0,
        "metadata": {},
        "optional": {},
        "ascend_quant_method": "ascend",
    }


def test_config_is_the_source_with_the_engines_marks(v3_source, v3_artifact):
    before = json.loads((v3_source / "config.json").read_text())
    after = json.loads((v3_artifact / "config.json").read_text())
    before.pop("quantization_config")
    marks = {"quantize": "w8a8_dynamic", "moe_quantize": "w4a8_dynamic", "mtp_quantize": "w8a8_dynamic"}
    assert after == before | marks


def test_side_files_travel_unchanged(v3_source, v3_artifact):
    for name in ("generation_config.json", "tokenizer_config.json", "LICENSE", "configuration_model.py"):
        assert (v3_artifact / name).read_bytes() == (v3_source / name).read_bytes()
    assert sorted(p.name for p in (v3_artifact / "npuq").iterdir()) == [
        "manifest.json",
        "recipe.yaml",
        "report.json",
        "rope.safetensors",
    ]


def test_every_tensor_is_aligned_to_its_item_size(v3_artifact):
    for path in v3_artifact.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        for name, entry in header.items():
            if name != "__metadata__":
                item = {"F32": 4, "BF16": 2, "I8": 1}[entry["dtype"]]
                assert (8 + length + entry["data_offsets"][0]) % item == 0, name


def test_manifest_errors_are_those_of_the_stored_codes(v3_artifact, stored, source):
    linears = json.loads((v3_artifact / "npuq" / "manifest.json").read_text())["linears"]
    for name, entry in linears.items():
        codes = stored[name].numpy()
        codes = unpack(codes) if entry["scheme"] == "W4A8_DYNAMIC" else codes.astype(np.float64)
        restored = codes * stored[name + "_scale"].numpy().astype(np.float64)
        error = np.sqrt(((source[name] - restored) ** 2).sum() / (source[name] ** 2).sum())
        # int4 tells it from weights that are 2^-14 of the row's largest off at most, where rounding is 2^-4.6 off on
        # average: 1.5e-3 of the error if all were off the same way, which hundreds of weights are not.
        tolerance = 1e-4 if entry["scheme"] == "W4A8_DYNAMIC" else 1e-5
        assert entry["relative_error"] == pytest.approx(error, rel=tolerance), name
        assert entry["method"] == "minmax"


@pytest.mark.parametrize("family", ["kimi", "v2lite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_other_families_and_dtypes(
    family: str, dtype: torch.dtype, make_checkpoint: Callable[..., Path], tmp_path: Path
):
    source = make_checkpoint(family=family, dtype=dtype, shards=1, config={"torch_dtype": str(dtype)[6:]})
    convert_checkpoint(source, tmp_path / "out", method="minmax")
    before, after = load_all(source), load_all(tmp_path / "out")
    assert set(before) <= set(after)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(after[name], before[name]) and after[name].dtype == dtype
    expert = "model.layers.2.mlp.experts.3.up_proj.weight"
    restored = unpack(after[expert].numpy()) * after[expert + "_scale"].numpy()
    assert np.abs(restored - before[expert].float().numpy()).max() <= after[expert + "_scale"].max() * 0.501


def test_float_recipe_keeps_weights_and_adds_rope(v3_source: Path, source: dict[str, np.ndarray], tmp_path: Path):
    summary = convert_checkpoint(v3_source, tmp_path / "out", recipe="float")
    after = load_all(tmp_path / "out")
    assert set(after) == set(source)
    for name, tensor in after.items():
        assert torch.equal(tensor.float(), torch.from_numpy(source[name]).float().to(tensor.dtype).float()), name
    assert (tmp_path / "out" / "npuq" / "rope.safetensors").exists()
    assert "quantize" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert any("npuq's own runtime" in note for note in summary.notes)
    assert "own runtime" in (tmp_path / "out" / "README.md").read_text()


def test_zero_rows_have_a_defined_outcome(make_checkpoint: Callable[..., Path], tmp_path: Path):
    name = "model.layers.1.mlp.experts.0.gate_proj.weight"
    source = make_checkpoint(edit=lambda tensors: tensors[name][5].zero_())
    convert_checkpoint(source, tmp_path / "out")
    after = load_all(tmp_path / "out")
    assert not unpack(after[name].numpy())[5].any()
    assert after[name + "_scale"][5].item() > 0
    assert after[name.replace("weight", "scale_bias")][5].item() == 0


def test_a_router_bias_stored_in_bf16_is_written_in_float32(make_checkpoint: Callable[..., Path], tmp_path: Path):
    name = "model.layers.1.mlp.gate.e_score_correction_bias"

    def halve(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name].bfloat16()

    source = make_checkpoint(edit=halve)
    convert_checkpoint(source, tmp_path / "out", method="minmax")
    after = load_all(tmp_path / "out")[name]
    assert after.dtype == torch.float32 and torch.equal(after, load_all(source)[name].float())


def test_unknown_tensors_are_copied_and_reported_buffers_dropped(make_checkpoint: Callable[..., Path], tmp_path: Path):
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.extra"] = torch.arange(6.0).reshape(2, 3)
        tensors["model.scalar"] = torch.tensor(3.0)

    summary = convert_checkpoint(make_checkpoint(edit=add), tmp_path / "out", method="minmax")
    after = load_all(tmp_path / "out")
    assert torch.equal(after["model.extra"], torch.arange(6.0).reshape(2, 3))
    assert after["model.scalar"].item() == 3.0
    assert not any("inv_freq" in name for name in after)
    assert any("2 unknown tensors" in note for note in summary.notes)
    assert any("1 recomputable buffer" in note for note in summary.notes)


def test_absent_mtp_layers_are_fine_and_reported(make_checkpoint: Callable[..., Path], tmp_path: Path):
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    summary = convert_checkpoint(make_checkpoint(edit=drop), tmp_path / "out", method="minmax")
    assert any("does not have (layer 3)" in note for note in summary.notes)
    assert "mtp_quantize" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_a_tokenizer_that_is_tiktokens(make_checkpoint, tmp_path):
    """Kimi-K2's: ranks in tiktoken.model, and code, which alone is no tokenizer."""
    source = make_checkpoint(family="kimi")
    (source / "tokenizer.model").unlink()
    (source / "tokenization_kimi.py").write_text("# code\n")
    assert any("no tokenizer" in note for note in convert_checkpoint(source, tmp_path / "a", dry_run=True).notes)
    (source / "tiktoken.model").write_text("aGVsbG8= 0\n")
    assert not any("tokenizer" in note for note in convert_checkpoint(source, tmp_path / "a", dry_run=True).notes)
    convert_checkpoint(source, tmp_path / "out", method="minmax")
    assert (tmp_path / "out" / "tiktoken.model").read_text() == "aGVsbG8= 0\n"
