"""FP8 weights with every form of scales, against float64 arithmetic and other tools' own decoders."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.fp8 import Fp8Weight
from npuq.formats.sources.opening import open_weights
from npuq.formats.sources.weights import WeightSource

E8M0 = torch.float8_e8m0fnu


def source(directory: Path, tensors: dict[str, torch.Tensor], quantization: Any = None) -> WeightSource:
    directory.mkdir(parents=True, exist_ok=True)
    config = {} if quantization is None else {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return open_weights(Checkpoint.open(directory))


def codes(n: int, k: int) -> torch.Tensor:
    """Every finite code of e4m3fn, in random order."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    bits = torch.randint(0, 254, (n, k), generator=generator, dtype=torch.uint8)
    bits[bits >= 127] += 1  # 127 and 255 are NaN
    return bits.view(torch.float8_e4m3fn)


def decoded(bits: torch.Tensor) -> np.ndarray:
    """e4m3fn by its definition, in float64: a sign, four bits of exponent of bias 7, three of fraction."""
    raw = bits.view(torch.uint8).numpy().astype(np.int64)
    exponent, fraction = raw >> 3 & 15, (raw & 7) / 8
    size = np.where(exponent == 0, fraction * 2.0**-6, (1 + fraction) * 2.0 ** (exponent - 7.0))
    return np.where(raw & 128, -size, size)


def powers(bits: torch.Tensor) -> np.ndarray:
    """e8m0 by its definition: 2^(code − 127)."""
    return 2.0 ** (bits.view(torch.uint8).numpy().astype(np.float64) - 127)


def spread(scale: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """The scale of each element."""
    return scale.repeat(block[0], 0).repeat(block[1], 1)[: shape[0], : shape[1]]


def groups(block: Any) -> dict[str, Any]:
    """compressed-tensors' quantization_config for blocks."""
    return {"config_groups": {"group_0": {"weights": {"block_structure": block}}}}


FORMS: dict[str, tuple[str, torch.dtype, tuple[int, ...], tuple[int, int], Any]] = {
    # name of the scale, its dtype, its shape for a weight [160, 288], the block, quantization_config
    "F8_E4M3 128x128": ("_scale_inv", torch.float32, (2, 3), (128, 128), {"weight_block_size": [128, 128]}),
    "F8_E4M3 128x128 E8M0": ("_scale_inv", E8M0, (2, 3), (128, 128), {"quant_method": "fp8", "scale_fmt": "ue8m0"}),
    "F8_E4M3 128x128 bf16": ("_scale_inv", torch.bfloat16, (2, 3), (128, 128), None),
    "F8_E4M3 64x64": ("_scale_inv", torch.float32, (3, 5), (64, 64), None),
    "F8_E4M3 32x64 E8M0": ("_scale_inv", E8M0, (5, 5), (32, 64), {"weight_block_size": [32, 64]}),
    "F8_E4M3 1x32": ("_scale_inv", torch.float32, (160, 9), (1, 32), {"weight_block_size": [1, 32]}),
    "F8_E4M3 100x7": ("_scale_inv", torch.float32, (2, 42), (100, 7), {"weight_block_size": [100, 7]}),
    "F8_E4M3 by channel": ("_scale", torch.float32, (160, 1), (1, 288), None),
    "F8_E4M3 by channel, one dimension": ("_scale", torch.bfloat16, (160,), (1, 288), None),
    "F8_E4M3 by channel, half": ("_scale", torch.float16, (160, 1), (1, 288), {"weight_block_size": [128, 128]}),
    "F8_E4M3 by tensor": ("_scale", torch.float32, (1,), (160, 288), None),
    "F8_E4M3 by tensor, a scalar": ("_scale", torch.bfloat16, (), (160, 288), None),
    "F8_E4M3 64x128": ("_scale", torch.bfloat16, (3, 3), (64, 128), groups([64, 128])),
    "F8_E4M3 128x64": ("_scale", torch.float32, (2, 5), (128, 64), groups("128x64")),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form(form: str, tmp_path: Path) -> None:
    suffix, dtype, shape, block, quantization = FORMS[form]
    weight = codes(160, 288)
    generator = torch.Generator().manual_seed(1)
    if dtype is E8M0:
        scale = torch.randint(90, 130, shape, generator=generator, dtype=torch.uint8).view(E8M0)
        real = powers(scale)
    else:
        scale = (torch.rand(shape, generator=generator) + 0.01).to(dtype)
        real = scale.double().numpy()
    real = decoded(weight) * spread(real.reshape(-(-160 // block[0]), -1), (160, 288), block)
    weights = source(tmp_path, {"a.weight": weight, f"a.weight{suffix}": scale}, quantization)
    read = weights.weights["a.weight"]
    assert list(weights.weights) == ["a.weight"] and not weights.is_quantized
    assert read.dtype.split(",")[0].removesuffix(" bf16") == form.split(",")[0].removesuffix(" bf16")
    assert read.nbytes == 160 * 288 + scale.nbytes and read.block_rows == block[0]
    expected = torch.from_numpy(real.astype(np.float32))
    for start, stop in ((0, 160), (0, 1), (159, 160), (50, 131), (130, 130)):
        assert torch.equal(weights.rows_float32("a.weight", start, stop), expected[start:stop])
    stored = read.row_bytes()
    assert stored is not None and stored.scale is not None and stored.scale.dtype == np.float32
    assert stored.block == block


def test_every_power_of_two(tmp_path: Path) -> None:
    """All codes but NaN, exactly, of which the least is below float32's normal numbers."""
    scale = torch.arange(255, dtype=torch.uint8).view(E8M0)[:, None].contiguous()
    weight = torch.ones(255, 3).to(torch.float8_e4m3fn)
    weights = source(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale}, {"weight_block_size": [1, 128]})
    rows = weights.rows_float32("a.weight").double()
    assert all(float(row[0]) == math.ldexp(1.0, code - 127) for code, row in enumerate(rows))


def test_blocks_that_only_shapes_tell_are_of_one_size(tmp_path: Path) -> None:
    """A narrow weight tells nothing of its short side."""
    tensors = {"a.weight": codes(160, 288), "a.weight_scale_inv": torch.ones(5, 9)}
    tensors |= {"b.weight": codes(160, 20), "b.weight_scale_inv": torch.ones(5, 1)}
    weights = source(tmp_path / "one", tensors).weights
    assert {weight.block for weight in weights.values() if isinstance(weight, Fp8Weight)} == {(32, 32)}
    tensors |= {"c.weight": codes(160, 288), "c.weight_scale_inv": torch.ones(3, 9)}
    with pytest.raises(CheckpointError, match=r"'a.weight_scale_inv' and 'c.weight_scale_inv' tell blocks of 32"):
        source(tmp_path / "two", tensors)


def test_input_scales_are_no_weights(tmp_path: Path) -> None:
    tensors = {"a.weight": codes(4, 4), "a.weight_scale": torch.ones(1), "a.input_scale": torch.ones(1)}
    assert list(source(tmp_path, tensors).weights) == ["a.weight"]


Edit = Callable[[dict[str, torch.Tensor]], object]
ONES = torch.ones(160, 1)


@pytest.mark.parametrize(
    ("tensors", "quantization", "message"),
    [
        ({"a.weight_scale": None}, None, "has no scale 'a.weight_scale_inv' or 'a.weight_scale' in any shard"),
        ({"a.weight": None}, None, "scale 'a.weight_scale' belongs to no FP8 weight"),
        ({"a.weight": torch.ones(160, 288)}, None, "scale 'a.weight_scale' belongs to no FP8 weight"),
        ({"a.weight_scale_inv": torch.ones(2, 3)}, None, "two scales, 'a.weight_scale_inv' and 'a.weight_scale'"),
        ({"a.weight_scale": torch.ones(159, 1)}, None, r"is F32 \[159, 1\]; blocks of 128x128 over \[160, 288\] need"),
        ({"a.weight_scale": torch.ones(1, 160)}, None, r"need F32/BF16/F16 \[2, 3\], channels \[160, 1\]"),
        ({"a.weight_scale": torch.ones(288)}, None, r"is F32 \[288\]"),
        ({"a.weight_scale": ONES.double()}, None, r"is F64 \[160, 1\]"),
        ({"a.weight_scale": ONES.to(torch.int32)}, None, r"is I32 \[160, 1\]"),
        ({"a.weight_scale": ONES.to(E8M0)}, None, r"is F8_E8M0 \[160, 1\]"),
        (
            {"a.weight_scale": torch.ones(3, 5)},
            {"weight_block_size": [128, 128]},
            r"blocks of 128x128 over .* \[2, 3\]",
        ),
        ({"a.weight_scale": torch.ones(0, 1)}, None, r"is F32 \[0, 1\]"),
        ({}, groups("axb"), "block_structure 'axb' is not two"),
        (
            {},
            groups([0, 1]),
            r"block_structure \[0, 1\] is not two",
        ),
    ],
)
def test_tensors_that_do_not_fit(
    tensors: dict[str, torch.Tensor | None], quantization: Any, message: str, tmp_path: Path
) -> None:
    all_of = {"a.weight": codes(160, 288), "a.weight_scale": ONES, "b": torch.ones(1), **tensors}
    stored = {name: tensor for name, tensor in all_of.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message) as caught:
        source(tmp_path, stored, quantization)
    assert "\n" not in str(caught.value)


def test_powers_of_two_that_are_no_scale(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="'a' has dtype F8_E8M0"):
        source(tmp_path, {"a": ONES.to(E8M0)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1.0, 0.0])
@pytest.mark.parametrize("shape", [(160, 1), (2, 3), (1,)], ids=str)
def test_scales_that_are_no_factors(shape: tuple[int, ...], value: float, tmp_path: Path) -> None:
    """One bad scale is named, and rows that it does not touch are read."""
    scale = torch.ones(shape)
    scale.view(-1)[0] = value
    weight = source(tmp_path, {"a.weight": codes(160, 288), "a.weight_scale": scale}).weights["a.weight"]
    with pytest.raises(CheckpointError, match=r"tensor 'a.weight_scale' holds a scale (that|of zero)") as caught:
        weight.rows()
    assert "\n" not in str(caught.value)
    if len(shape) == 2:
        weight.rows(128, 160)
    if value == 0:
        assert weight.row_bytes() is None
    else:
        with pytest.raises(CheckpointError, match=r"'a.weight_scale' holds a scale that"):
            weight.row_bytes()


def test_the_power_of_two_that_is_nan(tmp_path: Path) -> None:
    scale = torch.full((2, 3), 255, dtype=torch.uint8).view(E8M0)
    weight = source(tmp_path, {"a.weight": codes(160, 288), "a.weight_scale_inv": scale}).weights["a.weight"]
    with pytest.raises(CheckpointError, match=r"'a.weight_scale_inv' holds a scale that is negative, infinite or NaN"):
        weight.rows()


def test_a_block_of_zeros_may_have_a_scale_of_zero(tmp_path: Path) -> None:
    """The largest weight over 448, as quantizers compute it without a floor."""
    weight, scale = codes(160, 288), torch.ones(2, 3)
    weight.view(torch.uint8)[128:, 256:] = 0
    scale[1, 2] = 0
    weights = source(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    assert torch.equal(weights.rows_float32("a.weight"), weight.float())
    assert weights.weights["a.weight"].row_bytes() is None
