"""int4 in groups of 32 inputs, as Kimi stores its experts: the values are compressed-tensors' own, and convert to
the same bytes as they do. Other packings are refused in a line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign
import kimi_k25
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import npuq
from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights
from npuq.quant.stored_rows import BlockScale, StoredRows

EXPERT = "model.layers.1.mlp.experts.3.down_proj"
# What the authors' config.json says of the experts.
PUBLISHED = QuantizationScheme(
    targets=["Linear"],
    weights=QuantizationArgs(**kimi_k25.QUANTIZATION["config_groups"]["group_0"]["weights"]),
)

Tensors = dict[str, Tensor]


def write(directory: Path, tensors: Tensors, config: dict[str, Any], like: Path) -> Path:
    shutil.copytree(like, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def compressed(float_tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The experts packed by compressed-tensors, and the checkpoint with the values that it unpacks."""
    stored: Tensors = {}
    values = dict(float_tensors)
    for name, weight in float_tensors.items():
        if ".mlp.experts." not in name:
            stored[name] = weight
            continue
        scale = (weight.float().unflatten(1, (-1, 32)).abs().amax(2) / 7).bfloat16()
        state = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, PUBLISHED)
        unpacked = PackedQuantizationCompressor.decompress(
            {part: tensor.float() if part == "weight_scale" else tensor for part, tensor in state.items()}, PUBLISHED
        )
        values[name] = unpacked["weight"].float()
        stored |= {f"{name.removesuffix('weight')}{part}": tensor for part, tensor in state.items()}
    return stored, values


@pytest.fixture(scope="module")
def config(float_model: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((float_model / "config.json").read_text())
    return {**found, "quantization_config": kimi_k25.QUANTIZATION}


@pytest.fixture(scope="module")
def directory(
    compressed: tuple[Tensors, Tensors],
    config: dict[str, Any],
    float_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    return write(tmp_path_factory.mktemp("grouped") / "source", compressed[0], config, float_model)


def test_values_are_those_of_compressed_tensors(compressed: tuple[Tensors, Tensors], directory: Path) -> None:
    """Whole, and any rows of it."""
    stored, values = compressed
    assert stored[f"{EXPERT}.weight_packed"].dtype is torch.int32
    assert stored[f"{EXPERT}.weight_shape"].dtype is torch.int64
    with Checkpoint.open(directory) as checkpoint:
        source = open_weights(checkpoint)
        assert not source.is_quantized and source.weights.keys() == values.keys()
        for name, expected in values.items():
            weight = source.weights[name]
            assert torch.equal(weight.rows().to_float32(), expected.float()), name
            assert torch.equal(weight.rows(3, 8).to_float32(), expected.float()[3:8]), name
        weight = source.weights[f"{EXPERT}.weight"]
        assert (weight.shape, weight.dtype, weight.float_code) == (values[f"{EXPERT}.weight"].shape, "INT4_G32", "BF16")
        assert weight.nbytes == sum(stored[name].nbytes for name in weight.stored_names)


def test_the_test_checkpoints_are_packed_as_compressed_tensors_does(float_tensors: Tensors) -> None:
    words, scale = kimi_k25.packed(float_tensors[f"{EXPERT}.weight"])
    # Its values: rounding in bfloat16, as compressed-tensors would do with the weight, is not what is compared.
    weight = kimi_k25.values(words, scale)
    state = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, PUBLISHED)
    assert torch.equal(state["weight_packed"], words) and torch.equal(state["weight_scale"], scale)


@settings(max_examples=60)
@given(rows=st.integers(1, 5), groups=st.integers(1, 9), first=st.integers(0, 4), seed=st.integers(0, 2**31))
def test_any_words_and_scales(rows: int, groups: int, first: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(1 << 31), 1 << 31, (rows, 4 * groups), generator=generator).to(torch.int32)
    scale = (torch.randn(first + rows, groups, generator=generator) ** 3).bfloat16()
    decoded = StoredRows(words.view(torch.uint8), BlockScale(scale.float(), first, 1, 32))
    assert decoded.columns == 32 * groups
    assert torch.equal(decoded.to_float32(), kimi_k25.values(words, scale[first:]))
    codes = torch.randint(-8, 8, (rows, 32 * groups), generator=generator)
    decoded = StoredRows(kimi_k25.pack(codes).view(torch.uint8), BlockScale(torch.ones(rows, groups), 0, 1, 32))
    assert torch.equal(decoded.to_float32(), codes.float())


@pytest.fixture(scope="module")
def converted_values(
    compressed: tuple[Tensors, Tensors],
    config: dict[str, Any],
    float_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], tuple[Path, Path]]:
    """The checkpoint of the values, and what it converts to by a method."""
    folder, made = tmp_path_factory.mktemp("values"), {}
    plain = write(folder / "values", compressed[1], config | {"quantization_config": None}, float_model)

    def of(method: str) -> tuple[Path, Path]:
        if method not in made:
            made[method] = folder / method
            npuq.convert_checkpoint(plain, made[method], method=method)
        return plain, made[method]

    return of


# Torch's own search of scales sees rows alone, and takes long: it is run for the form that prepares them most.
@pytest.mark.parametrize(
    ("kernels", "method"),
    [*(("native", each) for each in ("minmax", "mse", "rotate+mse")), ("torch", "minmax"), ("torch", "rotate+mse")],
)
def test_it_converts_to_what_its_values_convert_to(
    converted_values: Callable[[str], tuple[Path, Path]],
    directory: Path,
    method: str,
    kernels: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, artifact_of_values = converted_values(method)
    if kernels == "torch":
        monkeypatch.setattr("npuq.formats.schemes.is_native", lambda scheme, columns: False)
        monkeypatch.setattr("npuq.convert.write.native_job.is_native", lambda scheme, columns: False)
    summary = npuq.convert_checkpoint(directory, tmp_path / "out", method=method)
    assert summary.source_bytes < npuq.convert_checkpoint(plain, tmp_path / "dry", dry_run=True).source_bytes
    assert not any("int4" in note or "quantization_config" in note for note in summary.notes)
    expected = {path.name: path.read_bytes() for path in artifact_of_values.glob("*.safetensors")}
    assert expected == {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")}
    described, artifact = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("quant_model_description.json", "config.json")
    )
    assert "quantization_config" not in artifact and artifact["moe_quantize"] == "w4a8_dynamic"
    assert not any("_packed" in name or "_shape" in name for name in described)
    assert npuq.verify(tmp_path / "out", directory).problems == ()


def test_the_runtime_computes_with_its_values(
    compressed: tuple[Tensors, Tensors], directory: Path, config: dict[str, Any], float_model: Path, tmp_path: Path
) -> None:
    plain = write(tmp_path / "values", compressed[1], config | {"quantization_config": None}, float_model)
    tokens = [list(range(40, 60))]
    expected = torch.cat(list(npuq.load(plain).logits(tokens)))
    assert torch.equal(torch.cat(list(npuq.load(directory).logits(tokens))), expected)


def test_inspect_lists_them(directory: Path) -> None:
    found = npuq.inspect(directory)
    (line,) = [line for line in found.lines if line.role == "routed_expert"]
    assert (found.kind, line.scheme) == ("checkpoint", "INT4_G32")
    assert 4.5 < line.bits < 4.6


CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nothing": (lambda c: c.update(quantization_config=None), "has no quantization_config"),
    "FP8": (lambda c: c.update(quantization_config={"quant_method": "fp8"}), "claims 'fp8'"),
    "groups of 128": (lambda c: weights(c).update(group_size=128), "claims scales by 'group' of 128"),
    "a channel": (lambda c: weights(c).update(strategy="channel"), "claims scales by 'channel' of 32"),
}


def weights(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    return found


@pytest.mark.parametrize("case", CLAIMS)
def test_storage_counts_and_a_note_says_what_config_json_claims(
    case: str, compressed: tuple[Tensors, Tensors], config: dict[str, Any], float_model: Path, tmp_path: Path
) -> None:
    edit, words = CLAIMS[case]
    changed = json.loads(json.dumps(config))
    edit(changed)
    source = write(tmp_path / "source", compressed[0], changed, float_model)
    summary = npuq.convert_checkpoint(source, tmp_path / "out", dry_run=True)
    assert [note for note in summary.notes if "int4" in note] == [
        f"{sum(name.endswith('_packed') for name in compressed[0])} weights are stored in int4 groups of 32, and "
        f"config.json {words}: storage counts"
    ]


REFUSED_CLAIMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "asymmetric": (lambda c: weights(c).update(symmetric=False), "zero points (asymmetric codes) are not read"),
    "activation order": (lambda c: weights(c).update(actorder="group"), "an activation order (actorder) is not read"),
    "8 bits": (lambda c: weights(c).update(num_bits=8), "packed weights of 8 bits, type 'int', are not read"),
    "floats": (lambda c: weights(c).update(type="float"), "packed weights of 4 bits, type 'float', are not read"),
}


@pytest.mark.parametrize("case", REFUSED_CLAIMS)
def test_claims_that_change_the_codes_meaning_are_refused(
    case: str, compressed: tuple[Tensors, Tensors], config: dict[str, Any], float_model: Path, tmp_path: Path
) -> None:
    edit, words = REFUSED_CLAIMS[case]
    changed = json.loads(json.dumps(config))
    edit(changed)
    source = write(tmp_path / "source", compressed[0], changed, float_model)
    with pytest.raises(CheckpointError, match=r"config\.json: quantization_config: ") as caught:
        npuq.convert_checkpoint(source, tmp_path / "out")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def regrouped(tensors: Tensors, size: int) -> None:
    for name in [name for name in tensors if name.endswith("experts.3.down_proj.weight_scale")]:
        columns = 8 * tensors[name.replace("_scale", "_packed")].shape[1]
        tensors[name] = torch.ones(tensors[name].shape[0], columns // size).bfloat16()


def changed(suffix: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        tensors[f"{EXPERT}.{suffix}"] = change(tensors[f"{EXPERT}.{suffix}"]).contiguous()

    return edit


def beside(suffix: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{EXPERT}.{suffix}": torch.zeros(4, dtype=torch.int32)})


REFUSED: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "zero points": (beside("weight_zero_point"), f"'{EXPERT}.weight_zero_point': zero points"),
    "activation order": (beside("weight_g_idx"), f"'{EXPERT}.weight_g_idx': an activation order"),
    "NVFP4": (beside("weight_global_scale"), f"'{EXPERT}.weight_global_scale': 4-bit floats (NVFP4)"),
    "NVFP4's bytes": (changed("weight_packed", lambda t: t.view(torch.uint8)), "is U8"),
    "groups of 64": (lambda tensors: regrouped(tensors, 64), "groups of 32, the only size that npuq reads, have BF16"),
    "groups of 16": (lambda tensors: regrouped(tensors, 16), "groups of 32, the only size that npuq reads, have BF16"),
    "one scale a channel": (changed("weight_scale", lambda t: t[:, :1]), "groups of 32, the only size that npuq reads"),
    "codes of 64 bits": (changed("weight_packed", lambda t: t.long()), "is I64"),
    "one row of words": (changed("weight_packed", lambda t: t.flatten()), "not I32 rows of eight codes a word"),
    "a row less": (changed("weight_packed", lambda t: t[:-1]), f"'{EXPERT}.weight_scale' is BF16"),
    "whole scales": (changed("weight_scale", lambda t: t.int()), "is I32"),
    "floats too": (lambda t: t.update({f"{EXPERT}.weight": torch.zeros(2, 2)}), "are one weight stored twice"),
    "no scale": (lambda tensors: tensors.pop(f"{EXPERT}.weight_scale"), f"has no '{EXPERT}.weight_scale'"),
    "no shape": (lambda tensors: tensors.pop(f"{EXPERT}.weight_shape"), f"has no '{EXPERT}.weight_shape'"),
    "no codes": (lambda tensors: tensors.pop(f"{EXPERT}.weight_packed"), "belongs to no linear"),
    "shape of three": (changed("weight_shape", lambda t: torch.cat([t, t[:1]])), "is I64 [3], not I32 [2]"),
    "shape in floats": (changed("weight_shape", lambda t: t.float()), "is F32 [2], not I32 [2]"),
    "another shape": (changed("weight_shape", lambda t: t + 8), "but its codes are"),
    "a scale of NaN": (changed("weight_scale", lambda t: t * torch.nan), f"'{EXPERT}.weight' holds infinities or NaN"),
    "an infinite scale": (changed("weight_scale", lambda t: t / 0), f"'{EXPERT}.weight' holds infinities or NaN"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_another_packing_and_damage_are_refused_by_name(
    case: str, compressed: tuple[Tensors, Tensors], config: dict[str, Any], float_model: Path, tmp_path: Path
) -> None:
    edit, words = REFUSED[case]
    tensors = dict(compressed[0])
    edit(tensors)
    source = write(tmp_path / "source", tensors, config, float_model)
    with pytest.raises(CheckpointError) as caught:
        npuq.convert_checkpoint(source, tmp_path / "out")
    assert words in str(caught.value) and EXPERT in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "npuq" / "manifest.json").exists()


def test_packed_codes_of_one_scale_a_channel_stay_codes(float_model: Path, tmp_path: Path) -> None:
    found = npuq.inspect(foreign.write_compressed(float_model, tmp_path / "in", packed=True))
    assert found.kind == "quantized_checkpoint"
