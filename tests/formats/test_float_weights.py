"""Float weights: FP8 blocks dequantized exactly, wherever their scales are; float dtypes kept to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from npuq.errors import CheckpointError
from npuq.formats.checkpoint import INDEX_NAME, Checkpoint
from npuq.formats.sources.opening import open_weights
from npuq.formats.sources.weights import WeightSource


def source(directory: Path, shards: list[dict[str, torch.Tensor]], config: dict | None = None) -> WeightSource:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config or {}))
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, directory / f"{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{number}.safetensors")
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return open_weights(Checkpoint.open(directory))


def fp8(n: int, k: int, block: tuple[int, int] = (128, 128)) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """An FP8 weight, its scales, and what it stands for, element by element in float64."""
    generator = torch.Generator().manual_seed(n * 1000 + k)
    weight = (torch.randn(n, k, generator=generator) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-n // block[0]), -(-k // block[1]), generator=generator) + 0.01
    real = weight.double().numpy().copy()
    for i in range(n):
        for j in range(k):
            real[i, j] *= scale[i // block[0], j // block[1]].item()
    return weight, scale, real


@pytest.mark.parametrize(("n", "k"), [(128, 128), (192, 130), (1, 300), (257, 5)])
def test_fp8_rows_from_any_place(n: int, k: int, tmp_path: Path) -> None:
    weight, scale, real = fp8(n, k)
    weights = source(tmp_path, [{"a.weight": weight}, {"a.weight_scale_inv": scale}])
    assert list(weights.weights) == ["a.weight"]
    assert weights.weights["a.weight"].block_rows == 128
    assert weights.weights["a.weight"].nbytes == n * k + 4 * scale.numel()
    expected = torch.from_numpy(real.astype(np.float32))
    for start, stop in ((0, n), (0, 1), (n // 2, n), (n - 1, n), (n // 3, n // 2 + 1)):
        assert torch.equal(weights.rows_float32("a.weight", start, stop), expected[start:stop])
        assert torch.equal(weights.rows_float("a.weight", start, stop), expected[start:stop].bfloat16())


def test_other_block_sizes_are_read_from_the_config(tmp_path: Path) -> None:
    weight, scale, real = fp8(40, 50, (16, 32))
    config = {"quantization_config": {"weight_block_size": [16, 32]}, "torch_dtype": "float16"}
    weights = source(tmp_path, [{"a.weight": weight, "a.weight_scale_inv": scale}], config)
    assert torch.equal(weights.rows_float32("a.weight"), torch.from_numpy(real.astype(np.float32)))
    assert weights.rows_float("a.weight").dtype == torch.float16
    assert weights.weights["a.weight"].float_code == "F16"


@pytest.mark.parametrize(
    "block",
    [[0, 128], [128], [128, True], [128, 128.0], [1 << 25, 128], [(1 << 64) + 1, 128], [128, 10**39], "128"],
    ids=lambda block: str(block)[:30],
)
def test_block_sizes_that_no_checkpoint_has(block: object, tmp_path: Path) -> None:
    """A block of 2^64 + 1 rows needs one scale here and is one row to C, which would read as many scales as rows."""
    weight, scale, _ = fp8(40, 50)
    config = {"quantization_config": {"weight_block_size": block}}
    with pytest.raises(CheckpointError, match=r"config\.json: weight_block_size .* two sizes from 1 to") as raised:
        source(tmp_path, [{"a.weight": weight, "a.weight_scale_inv": scale}], config)
    assert len(str(raised.value)) < len(str(tmp_path)) + 250


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float_weights_keep_their_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.randn(7, 9).to(dtype)
    weights = source(tmp_path, [{"a": value, "b": value[0].clone()}])
    assert torch.equal(weights.rows_float("a", 2, 5), value[2:5])
    assert torch.equal(weights.rows_float32("a"), value.float())
    assert torch.equal(weights.rows_float32("b", 1, 3), value[0, 1:3].float())


SCALE = torch.ones(1, 1)
WEIGHT = torch.ones(4, 4).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": WEIGHT}, "no scale 'a_scale_inv'"),
        ({"a": WEIGHT, "a_scale_inv": torch.ones(2, 1)}, r"need F32/BF16/F8_E8M0 \[1, 1\]"),
        ({"a": WEIGHT, "a_scale_inv": SCALE.half()}, "need F32"),
        ({"a": WEIGHT[0].clone(), "a_scale_inv": SCALE}, "not a matrix"),
        ({"a": torch.ones(4, 4), "a_scale_inv": SCALE}, "belongs to no FP8 weight"),
        ({"b": torch.ones(1), "a_scale_inv": SCALE}, "belongs to no FP8 weight"),
        ({"a": torch.ones(4, dtype=torch.int32)}, "dtype I32"),
    ],
)
def test_weights_no_dialect_explains_are_refused(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        source(tmp_path, [tensors])


def test_the_shipped_checkpoint_has_a_scale_in_another_shard(example_fp8: Path) -> None:
    checkpoint = Checkpoint.open(example_fp8)
    apart = [
        name
        for name, info in checkpoint.tensors.items()
        if name.endswith("_scale_inv") and checkpoint.tensors[name.removesuffix("_scale_inv")].file != info.file
    ]
    assert apart
    weights = open_weights(checkpoint)
    for name in apart:
        rows = weights.rows_float32(name.removesuffix("_scale_inv"))
        assert rows.isfinite().all()
        assert 0 < rows.abs().mean() < 1
