"""FP4 weights with E8M0 scales: every nibble and every scale by its definition, and what is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights
from npuq.formats.sources.weights import WeightSource

E8M0 = torch.float8_e8m0fnu
W, S = "layers.0.ffn.experts.0.w1.weight", "layers.0.ffn.experts.0.w1.scale"
# Of E2M1: a sign, two bits of exponent of bias 1, one of fraction.
MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
VALUES = [*MAGNITUDES, *(-x for x in MAGNITUDES)]


def source(directory: Path, tensors: dict[str, Tensor], expert_dtype: str | None = "fp4") -> WeightSource:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"expert_dtype": expert_dtype} if expert_dtype else {}))
    save_file(tensors, directory / "model.safetensors")
    return open_weights(Checkpoint.open(directory))


def packed(nibbles: list[int]) -> Tensor:
    pairs = zip(nibbles[0::2], nibbles[1::2], strict=True)
    return torch.tensor([low | high << 4 for low, high in pairs], dtype=torch.uint8).view(torch.int8)


def scales(bytes_: list[int], columns: int = 1) -> Tensor:
    return torch.tensor(bytes_, dtype=torch.uint8).view(-1, columns).view(E8M0)


def test_every_nibble_in_both_places(tmp_path: Path) -> None:
    nibbles = [*range(16), *reversed(range(16))]
    read = source(tmp_path, {W: packed(nibbles)[None], S: scales([128])})
    rows = read.rows_float32(W)
    assert read.weights[W].shape == (1, 32)
    assert rows.tolist() == [[2 * VALUES[nibble] for nibble in nibbles]]
    assert torch.equal(torch.signbit(rows[0]), torch.tensor([nibble > 7 for nibble in nibbles]))


def test_every_scale(tmp_path: Path) -> None:
    """Ones under 2^-127, a subnormal number, to 2^127; each group of a row has its own."""
    read = source(tmp_path, {W: torch.full((1, 255 * 16), 0x22, dtype=torch.int8), S: scales(list(range(255)), 255)})
    rows = read.rows_float32(W).double()
    exponents = torch.arange(255).repeat_interleave(32) - 127.0
    assert torch.equal(rows[0], torch.exp2(exponents.double()))
    read = source(tmp_path / "rows", {W: torch.full((255, 16), 0x22, dtype=torch.int8), S: scales(list(range(255)))})
    assert torch.equal(read.rows_float32(W, 3, 5), torch.exp2(torch.tensor([-124.0, -123.0]))[:, None].expand(2, 32))


def test_nan_scale_is_refused_by_name(tmp_path: Path) -> None:
    read = source(tmp_path, {W: torch.zeros(2, 16, dtype=torch.int8), S: scales([127, 255])})
    for reading in (lambda: read.rows_float32(W), read.weights[W].row_bytes):
        with pytest.raises(CheckpointError, match=f"{S}.*255"):
            reading()
    assert read.rows_float32(W, 0, 1).count_nonzero() == 0  # the other row is sound


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(S), f"FP4 tensor '{W}'.*no scale '{S}'"),
        (lambda t: t.update({S: scales([127] * 4)}), f"scale '{S}' is F8_E8M0 .4, 1.; 2 rows of 1 groups"),
        (lambda t: t.update({S: torch.ones(2, 1)}), f"scale '{S}' is F32"),
        (lambda t: t.update({W: torch.zeros(2, 15, dtype=torch.int8)}), f"FP4 tensor '{W}' is I8 .2, 15."),
        (lambda t: t.update({W: torch.zeros(32, dtype=torch.int8)}), f"FP4 tensor '{W}' is I8 .32."),
        (lambda t: t.pop(W), f"scale '{S}' belongs to no FP8 weight"),
        (lambda t: t.update({"x": torch.zeros(2, 16, dtype=torch.int8)}), "FP4 tensor 'x'.*no scale"),
        (lambda t: t.update({W: torch.zeros(2, 32)}), f"scale '{S}' belongs to no"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, change: Change, message: str) -> None:
    tensors = {W: torch.zeros(2, 16, dtype=torch.int8), S: scales([127, 127])}
    change(tensors)
    with pytest.raises(CheckpointError, match=message):
        source(tmp_path, tensors)


@pytest.mark.parametrize("expert_dtype", [None, "int8", "FP8"])
def test_int8_codes_are_no_fp4_unless_config_says_so(tmp_path: Path, expert_dtype: str | None) -> None:
    with pytest.raises(CheckpointError, match=f"{W}.*I8.*description is missing|{S}.*belongs to no"):
        source(tmp_path, {W: torch.zeros(2, 16, dtype=torch.int8), S: scales([127, 127])}, expert_dtype)
