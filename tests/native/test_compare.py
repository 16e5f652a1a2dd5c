"""Decoding and comparison of stored rows: torch's bits, and float64 sums of numpy, at every level."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from npuq.dtypes import array_dtype, torch_dtype
from npuq.formats.int4 import pack_int4
from npuq.native.binding import source_rows
from npuq.native.quantization import DECODED, SourceRows, are_finite, compare_rows, decode_rows
from npuq.quant.scales import NonFiniteError
from npuq.quant.stored_rows import BlockScale, StoredRows

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

FLOATS = ("F32", "BF16", "F16")


def _stored(dtype: str, rows: int, columns: int, seed: int = 0) -> StoredRows:
    generator = torch.Generator().manual_seed(seed)
    if dtype == "U8":
        packed = torch.randint(0, 256, (rows, columns // 2), generator=generator).to(torch.uint8)
        scale = torch.rand(-(-rows // 3), -(-columns // 8), generator=generator)
        return StoredRows(packed, BlockScale(scale, 0, 3, 8))
    x = (torch.randn(rows, columns, generator=generator) * 0.3).to(torch_dtype(dtype))
    if dtype != "F8_E4M3":
        return StoredRows(x)
    return StoredRows(x, BlockScale(torch.rand(-(-(rows + 1) // 3), -(-columns // 7), generator=generator), 1, 3, 7))


@pytest.mark.parametrize("to", DECODED)
@pytest.mark.parametrize("dtype", [*FLOATS, "F8_E4M3", "U8"])
def test_decoded_rows_are_torchs(dtype: str, to: str) -> None:
    for level in LEVELS:
        for rows, columns in ((1, 2), (5, 38), (4, 256)):
            stored, out = _stored(dtype, rows, columns), np.empty((rows, columns), array_dtype(to))
            decode_rows(source_rows(stored), to, out, level)
            assert torch.equal(torch.from_numpy(out).view(torch_dtype(to)), stored.to(torch_dtype(to)))


@pytest.mark.parametrize(
    ("value", "dtype", "to"),
    [
        (float("nan"), "BF16", "BF16"),
        (float("-inf"), "F32", "F32"),
        (3.4e38, "F32", "BF16"),  # rounds to an infinity
        (float("nan"), "F8_E4M3", "BF16"),
    ],
)
def test_what_is_not_finite_or_becomes_so_is_refused(value: float, dtype: str, to: str) -> None:
    stored = _stored(dtype, 4, 70)
    stored.rows[2, 69] = value
    for level in LEVELS:
        with pytest.raises(NonFiniteError, match="row 2 "):
            decode_rows(source_rows(stored), to, None, level)
        decode_rows(source_rows(StoredRows(stored.rows[:2], stored.blocks)), to, None, level)


@pytest.mark.parametrize("dtype", FLOATS)
def test_an_infinity_anywhere_in_flat_bytes(dtype: str) -> None:
    x = torch.zeros((1 << 17) + 5, dtype=torch_dtype(dtype))
    for place in (None, 0, (1 << 17) - 1, len(x) - 1):
        if place is not None:
            x.zero_()[place] = float("inf")
        assert are_finite(x.view(torch.uint8).numpy(), dtype) == (place is None)
    assert are_finite(np.empty(0, np.uint8), dtype)


def _codes(bits: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    bound = 1 << (bits - 1)
    codes = torch.randint(-bound, bound, (rows, columns), generator=generator).to(torch.int8)
    return codes, torch.rand(rows, generator=generator) / bound


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [*FLOATS, "F8_E4M3", "U8"])
def test_errors_and_sums_are_those_of_float64(dtype: str, bits: int) -> None:
    for rows, columns, slices in ((2, 2, 1), (4, 38, 2), (6, 2048, 16)):
        stored, (codes, scale) = _stored(dtype, rows, columns), _codes(bits, rows, columns)
        source = stored.to_float32().double()
        dequantized = (codes.float() * scale[:, None]).double()
        packed = (pack_int4(codes) if bits == 4 else codes).numpy()
        sums = codes.view(rows, slices, -1).sum(2, dtype=torch.int32)
        for level in LEVELS:
            found = compare_rows(packed, scale.numpy(), bits, slices, source_rows(stored), level)
            assert np.array_equal(found.sums, sums.numpy())
            assert found.squared_error == pytest.approx((dequantized - source).square().sum(1).numpy(), rel=1e-12)
            assert found.squared_norm == pytest.approx(source.square().sum(1).numpy(), rel=1e-12)
            alone = compare_rows(packed, scale.numpy(), bits, slices, None, level)
            assert np.array_equal(alone.sums, sums.numpy())


def test_every_byte_unpacks_to_its_codes() -> None:
    packed = np.arange(-128, 128, dtype=np.int8)[None]
    for level in LEVELS:
        sums = [
            compare_rows(packed[:, i : i + 1].copy(), np.ones(2, np.float32), 4, 1, None, level).sums[:, 0].tolist()
            for i in range(256)
        ]
        assert sums == [[((b & 15) ^ 8) - 8, b >> 4] for b in range(-128, 128)]


def test_nan_passes_through() -> None:
    stored = StoredRows(torch.full((2, 40), float("nan")))
    found = compare_rows(np.zeros((2, 40), np.int8), np.ones(2, np.float32), 8, 0, source_rows(stored))
    assert np.isnan(found.squared_error).all() and np.isnan(found.squared_norm).all()


GOOD: dict[str, Any] = {
    "codes": np.zeros((4, 32), np.int8),
    "scale": np.ones(4, np.float32),
    "bits": 8,
    "sum_columns": 1,
    "stored": SourceRows(np.zeros((4, 64), np.uint8), "BF16"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": np.zeros((3, 32), np.int8)},
        {"codes": np.zeros((4, 64), np.int8)[:, :32]},
        {"codes": np.zeros((4, 32), np.uint8)},
        {"scale": np.ones(4)},
        {"scale": np.ones((4, 1), np.float32)},
        {"bits": 4},
        {"bits": 5},
        {"sum_columns": 17},
        {"sum_columns": 5},
        {"sum_columns": -1},
        {"stored": SourceRows(np.zeros((3, 64), np.uint8), "BF16")},
        {"stored": SourceRows(np.zeros((4, 32), np.uint8), "BF16")},
        {"stored": SourceRows(np.zeros((4, 65), np.uint8), "BF16")},
        {"stored": SourceRows(np.zeros((4, 32), np.uint8), "F8_E4M3")},
        {"stored": SourceRows(np.zeros((4, 32), np.uint8), "F8_E4M3", np.ones((1, 1), np.float32), (2, 32))},
        {"stored": SourceRows(np.zeros((4, 256), np.uint8), "F64")},
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any]) -> None:
    compare_rows(**GOOD)
    with pytest.raises(ValueError, match="compare_rows"):
        compare_rows(**{**GOOD, **changes})


def test_decoding_what_does_not_fit_is_refused() -> None:
    good = SourceRows(np.zeros((4, 64), np.uint8), "BF16")
    decode_rows(good, "F32", np.empty((4, 32), np.float32))
    with pytest.raises(ValueError, match="decode_rows"):
        decode_rows(good, "F16", np.empty((4, 32), np.float16))
    for stored, out in (
        (good, np.empty((4, 31), np.float32)),
        (good, np.empty((4, 32), np.uint16)),
        (dataclasses.replace(good, memory=np.zeros((4, 0), np.uint8)), np.empty((4, 0), np.float32)),
        (dataclasses.replace(good, dtype="I8"), np.empty((4, 64), np.float32)),
    ):
        with pytest.raises(ValueError, match="decode_rows"):
            decode_rows(stored, "F32", out)
