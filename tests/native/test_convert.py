"""The one-pass conversion gives the bits of the torch version, at every level, for every kind of row."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npuq.formats.schemes import QuantizedRows, Scheme, quantize_rows
from npuq.native import binding as native
from npuq.quant.scales import Method, NonFiniteError
from npuq.quant.stored_rows import BlockScale, StoredRows

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

DATA_FREE = [Method.MINMAX, Method.MSE]
KINDS = ["normal", "heavy tails", "whole numbers", "outlier", "sparse", "constant", "bf16", "two sizes"]


def _rows(kind: str, rows: int, columns: int, exponent: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    if kind == "heavy tails":
        x = x**3
    elif kind == "whole numbers":
        x = torch.randint(-9, 10, x.shape, generator=generator).float()
    elif kind == "outlier":
        x[:, 0] *= 300
    elif kind == "sparse":
        x *= torch.rand(x.shape, generator=generator) < 0.02
    elif kind == "constant":
        x = torch.where(x > 0, 3.0, -3.0)
    elif kind == "bf16":
        x = x.bfloat16().float()
    elif kind == "two sizes":
        x = torch.where(x > 0, x, x * 1e-4)
    return x * 2.0**exponent


def _check(got: native.Quantized, expected: QuantizedRows) -> None:
    assert torch.equal(got.codes, expected.tensors["weight"])
    assert torch.equal(got.scale, expected.tensors["weight_scale"])
    assert torch.equal(got.squared_error, expected.squared_error)
    assert torch.equal(got.squared_norm, expected.squared_norm)
    if got.bias is not None:
        assert torch.equal(got.bias, expected.tensors["scale_bias"])


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("scheme", [Scheme.W4A8, Scheme.W8A8])
@settings(max_examples=25)
@given(
    kind=st.sampled_from(KINDS),
    pairs=st.integers(1, 2),
    columns=st.one_of(st.integers(1, 40), st.integers(41, 1500)),
    exponent=st.sampled_from([-110, -99, -30, -6, 0, 20, 100]),
    seed=st.integers(0, 2**31),
)
def test_same_bits_as_torch(
    scheme: Scheme, method: Method, kind: str, pairs: int, columns: int, exponent: int, seed: int
) -> None:
    rows = _rows(kind, 2 * pairs, columns, exponent, seed)
    wide = columns % 16 == 0
    expected = quantize_rows(rows, scheme, method, row_parallel=wide)
    bits = scheme.weight_bits
    for level in LEVELS:
        got = native.quantize(StoredRows(rows), bits, method is Method.MSE, 16 if wide else 1, level)
        _check(got, expected)


@pytest.mark.parametrize("scheme", [Scheme.W4A8, Scheme.W8A8])
@pytest.mark.parametrize("piece", [2, 6, 30])
def test_piece_by_piece_through_one_memory(scheme: Scheme, piece: int) -> None:
    """FP8 in blocks of 7 rows, in which pieces begin anywhere: what torch makes of all rows."""
    generator, packed = torch.Generator().manual_seed(3), 2 if scheme is Scheme.W4A8 else 1
    rows = (torch.randn(30, 48, generator=generator) * 50).to(torch.float8_e4m3fn)
    blocks = BlockScale(torch.rand(5, 3, generator=generator) + 0.1, 0, 7, 16)
    memory, sums = torch.empty(piece, 48, dtype=torch.float8_e4m3fn), np.zeros((2, 30))
    codes, bias = np.zeros((piece // packed + 1, 48), np.int8), np.zeros((30, 16), np.float32)
    out = native.NativeRows(codes, np.zeros((30, 1), np.float32), bias if packed == 2 else None, *sums)
    quantizer = native.Quantizer(native.source_rows(StoredRows(memory, blocks)), scheme.weight_bits, True, out)
    pieces = []
    for start in range(0, 30, piece):
        memory.copy_(rows[start : start + piece])
        quantizer.run(start, piece, 1)
        pieces.append(codes[1:].copy())
    assert not codes[0].any()
    expected = quantize_rows(StoredRows(rows, blocks).to_float32(), scheme, Method.MSE, row_parallel=True)
    tensors = (None if each is None else torch.from_numpy(each) for each in (out.scale, out.bias, *sums))
    _check(native.Quantized(torch.from_numpy(np.concatenate(pieces)), *tensors), expected)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("columns", [32, 96, 2048, 7168])
def test_int4_in_groups_of_32(columns: int, method: Method) -> None:
    """Every code under scales of two sizes and a zero one, of full rows and of a piece that begins in their middle."""
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randint(0, 256, (6, columns // 2), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(6, columns // 32, generator=generator) ** 4).bfloat16().float()
    scale[2, 0] = 0
    for first in (0, 2):
        stored = StoredRows(rows[first:], BlockScale(scale, first, 1, 32))
        for scheme in (Scheme.W4A8, Scheme.W8A8):
            expected = quantize_rows(stored.to_float32(), scheme, method, row_parallel=True)
            for level in LEVELS:
                _check(native.quantize(stored, scheme.weight_bits, method is Method.MSE, 16, level), expected)


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize(
    ("columns", "least", "spread"),
    # Groups alike, as in a trained layer, far apart, below what fixed point holds, and a row of part of a group.
    [(32, 120, 1), (96, 118, 3), (2048, 110, 9), (7168, 116, 6), (640, 60, 40), (640, 1, 200), (48, 120, 2)],
)
def test_fp4_in_groups_of_32(columns: int, least: int, spread: int, method: Method) -> None:
    """Every nibble under powers of two, a row of zeros, and a scale that is no power of two."""
    generator = torch.Generator().manual_seed(columns + least)
    rows = torch.randint(-128, 128, (6, columns // 2), generator=generator, dtype=torch.int8)
    rows[3] = 0x08  # 0 and -0
    scale = torch.exp2(torch.randint(least, least + spread, (6, -(-columns // 32)), generator=generator) - 127.0)
    scale[4, 0] *= 1.25
    for first in (0, 2):
        stored = StoredRows(rows[first:], BlockScale(scale, first, 1, 32))
        for scheme in (Scheme.W4A8, Scheme.W8A8):
            expected = quantize_rows(stored.to_float32(), scheme, method, row_parallel=True)
            for level in LEVELS:
                _check(native.quantize(stored, scheme.weight_bits, method is Method.MSE, 16, level), expected)


@pytest.mark.parametrize("columns", [512, 513, 4095, 4096, 4097, 7168])
def test_long_rows(columns: int) -> None:
    """Of whole vectors and parts of sums, a little more or less, and those of real models."""
    rows = _rows("bf16", 4, columns, -6, columns)
    for scheme in (Scheme.W4A8, Scheme.W8A8):
        expected = quantize_rows(rows, scheme, Method.MSE, row_parallel=False)
        for level in LEVELS:
            _check(native.quantize(StoredRows(rows), scheme.weight_bits, True, 1, level), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [2048, 8193, 20000])
def test_every_kind_of_long_row(kind: str, columns: int) -> None:
    """Long enough for states in int16, for more than one part of their sums, and for windows that grow or stay open."""
    rows = _rows(kind, 2, columns, 3, columns)
    for scheme in (Scheme.W4A8, Scheme.W8A8):
        expected = quantize_rows(rows, scheme, Method.MSE, row_parallel=False)
        for level in LEVELS:
            _check(native.quantize(StoredRows(rows), scheme.weight_bits, True, 1, level), expected)


@pytest.mark.parametrize("block", [16, 128])
def test_long_fp8_rows_full_of_equal_weights(block: int) -> None:
    """Many weights change their code at one scale, and blocks of very different size stand beside each other."""
    generator = torch.Generator().manual_seed(block)
    byte = (torch.randn(4, 7168, generator=generator) * 40).to(torch.float8_e4m3fn)
    scale = torch.rand(1, 7168 // block, generator=generator) ** 4 + 1e-3
    stored = StoredRows(byte, BlockScale(scale, 0, 128, block))
    for scheme in (Scheme.W4A8, Scheme.W8A8):
        expected = quantize_rows(stored.to_float32(), scheme, Method.MSE, row_parallel=False)
        for level in LEVELS:
            _check(native.quantize(stored, scheme.weight_bits, True, 1, level), expected)


@pytest.mark.parametrize("seed", [42, 81, 153, 232, 300, 317])
def test_optima_beside_the_states_that_were_looked_at(seed: int) -> None:
    """Rows whose best scale lies so close to a rounded one that which codes that one has is in doubt."""
    rows = _rows("normal", 2, 20 + seed % 200, 0, seed)
    rows = rows.sign() * rows.abs().sqrt()
    expected = quantize_rows(rows, Scheme.W4A8, Method.MSE, row_parallel=False)
    for level in LEVELS:
        _check(native.quantize(StoredRows(rows), 4, True, 1, level), expected)


@pytest.mark.parametrize("columns", [60, 4000])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rows_of_largest_weights(columns: int, share: float) -> None:
    """Weights just below a power of two, which round up to one in fixed point, beside others: alone, few and many."""
    generator = torch.Generator().manual_seed(columns)
    rows = torch.randn(6, columns, generator=generator) * 0.2
    top = 2 - 2.0**-23 * torch.randint(1, 2000, rows.shape, generator=generator)
    sign = torch.randn(rows.shape, generator=generator).sign()
    rows = torch.where(torch.rand(rows.shape, generator=generator) < share, top * sign, rows.clamp(-1.5, 1.5))
    rows[:, 3] = top[:, 3]
    expected = quantize_rows(rows, Scheme.W4A8, Method.MSE, row_parallel=False)
    for level in LEVELS:
        _check(native.quantize(StoredRows(rows), 4, True, 1, level), expected)


@pytest.mark.parametrize("kind", ["normal", "constant", "largest"])
def test_sums_of_the_widest_rows_fit(kind: str) -> None:
    """Magnitudes and codes as large as they can be: "largest" rounds up to 2**23 in fixed point, everywhere."""
    rows = _rows("normal" if kind == "normal" else "constant", 2, native.MOST_COLUMNS, 0, 0)
    if kind == "largest":
        rows *= (2 - 2.0**-23) / 3
    for scheme, method in product((Scheme.W4A8, Scheme.W8A8), DATA_FREE):
        expected = quantize_rows(rows, scheme, method, row_parallel=False)
        assert torch.allclose(expected.squared_norm, rows.double().square().sum(1))
        for level in LEVELS:
            _check(native.quantize(StoredRows(rows), scheme.weight_bits, method is Method.MSE, 1, level), expected)


@settings(max_examples=30)
@given(st.integers(1, 200), st.integers(0, 2**31), st.floats(0.5, 3))
def test_no_scale_is_better(columns: int, seed: int, power: float) -> None:
    """Against scales of every size, in float64: none has less error, whatever the distribution."""
    row = _rows("normal", 2, columns, 0, seed)
    row = row.sign() * row.abs() ** power
    got, w = native.quantize(StoredRows(row), 4, True, 1), row.double()
    largest = w.abs().amax(1, keepdim=True).clamp(min=1e-30)
    scales = largest * torch.logspace(-3, 0.5, 1000, dtype=torch.float64)
    codes = (w[:, None, :] / scales[:, :, None]).round().clamp(-8, 7)
    error = (w[:, None, :] - scales[:, :, None] * codes).square().sum(2).amin(1)
    # The scale is rounded to float32: a relative step u of it moves an error ‖r‖² by 2 · u · ‖r‖ · ‖w‖.
    rounding = 2 * 2.0**-24 * (error * got.squared_norm).sqrt() + 1e-12 * got.squared_norm
    assert bool((got.squared_error <= error * (1 + 1e-5) + rounding).all())


@given(
    rows=st.integers(1, 8).map(lambda half: 2 * half),
    columns=st.integers(1, 300),
    block=st.tuples(st.integers(1, 6), st.sampled_from([1, 7, 16, 100, 128, 200, 400])),
    first=st.integers(0, 5),
    seed=st.integers(0, 2**31),
)
def test_fp8_blocks(rows: int, columns: int, block: tuple[int, int], first: int, seed: int) -> None:
    """Every one of the 254 finite codes, in blocks that need not divide the matrix, from any row of a block on."""
    generator = torch.Generator().manual_seed(seed)
    first %= block[0]
    byte = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
    byte[byte % 128 == 127] = 0
    scale = torch.rand(-(-(first + rows) // block[0]), -(-columns // block[1]), generator=generator)
    stored = StoredRows(byte.view(torch.float8_e4m3fn), BlockScale(scale, first, *block))
    for method, bits in (Method.MSE, 4), (Method.MINMAX, 4), (Method.MINMAX, 8):
        scheme = Scheme.W4A8 if bits == 4 else Scheme.W8A8
        expected = quantize_rows(stored.to_float32(), scheme, method, row_parallel=False)
        for level in LEVELS:
            _check(native.quantize(stored, bits, method is Method.MSE, 1, level), expected)


@pytest.mark.parametrize("columns", [100, 200, 1100, 10944])
@pytest.mark.parametrize("level", LEVELS)
def test_fp8_rows_of_one_scale_each(level: str, columns: int) -> None:
    """Gaussian rows, of which a block ends where no segment does."""
    weight = torch.randn(4, columns, generator=torch.Generator().manual_seed(columns))
    scale = weight.abs().amax(1, keepdim=True) / 448
    stored = StoredRows((weight / scale).to(torch.float8_e4m3fn), BlockScale(scale, 0, 1, columns))
    for method, bits in product(DATA_FREE, (4, 8)):
        scheme = Scheme.W4A8 if bits == 4 else Scheme.W8A8
        expected = quantize_rows(stored.to_float32(), scheme, method, row_parallel=False)
        _check(native.quantize(stored, bits, method is Method.MSE, 1, level), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_fp8_scales_of_every_size(bits: int) -> None:
    """Scales that overflow in fixed point stand over zeros only; some are negative, or subnormal."""
    generator = torch.Generator().manual_seed(bits)
    byte = (torch.randn(8, 1024, generator=generator) * 60).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1e-3, -1e-3, 2.0, 1e-40, 3e38, 1.5e-3, 1e-30, 1e-4]])
    byte.view(torch.uint8)[:, 512:640] = 0x80  # minus zero, under 3e38
    byte.view(torch.uint8)[:2, 256:384] = 0
    byte.view(torch.uint8)[2:4] = 0
    stored = StoredRows(byte, BlockScale(scale, 0, 128, 128))
    scheme = Scheme.W4A8 if bits == 4 else Scheme.W8A8
    expected = quantize_rows(stored.to_float32(), scheme, Method.MINMAX, row_parallel=False)
    for level in LEVELS:
        _check(native.quantize(stored, bits, False, 1, level), expected)


@pytest.mark.parametrize("columns", [48, 1408, 2048])
@pytest.mark.parametrize("size", [2.0**-8, 2.0**-3, 1.0, 50.0])
def test_fp8_magnitudes_of_every_size(size: float, columns: int) -> None:
    """Subnormal, small and usual ones in blocks whose scales make up for it, beside blocks that do without: int4."""
    generator = torch.Generator().manual_seed(columns)
    factor = torch.ones(1, columns).view(-1, 16)
    factor[1::3] = size  # [blocks, 16]
    weight = torch.randn(8, columns, generator=generator) * 50
    byte = (weight * factor.view(1, -1)).to(torch.float8_e4m3fn)
    scale = (torch.rand(1, columns // 16, generator=generator) + 0.5) / factor[:, 0]
    scale[0, 1] *= 4  # the row's largest are here
    scale[0, -1] *= -1
    stored = StoredRows(byte, BlockScale(scale, 0, 128, 16))
    expected = quantize_rows(stored.to_float32(), Scheme.W4A8, Method.MINMAX, row_parallel=True)
    for level in LEVELS:
        _check(native.quantize(stored, 4, False, 16, level), expected)


@pytest.mark.parametrize("scheme", [Scheme.W4A8, Scheme.W8A8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sources(dtype: torch.dtype, scheme: Scheme) -> None:
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = bits[bits.isfinite()][:63424].view(64, -1)  # every finite value there is, subnormal ones too
    for method in DATA_FREE:
        expected = quantize_rows(rows.float(), scheme, method, row_parallel=False)
        for level in LEVELS:
            _check(native.quantize(StoredRows(rows), scheme.weight_bits, method is Method.MSE, 1, level), expected)


@given(
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    kind=st.sampled_from(KINDS),
    pairs=st.integers(1, 2),
    columns=st.one_of(st.integers(1, 300), st.integers(1000, 1100)),
    offset=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_int4_of_any_float_from_where_it_lies(
    dtype: torch.dtype, kind: str, pairs: int, columns: int, offset: int, seed: int
) -> None:
    """Rows of every length, at addresses that no vector is aligned to, whose neighbours in memory are not finite."""
    memory = torch.full((2 * pairs * columns + offset + 100,), float("nan"), dtype=dtype)
    rows = memory[offset : offset + 2 * pairs * columns].view(2 * pairs, columns)
    rows.copy_(_rows(kind, 2 * pairs, columns, -2, seed))
    for method in DATA_FREE:
        expected = quantize_rows(rows.float(), Scheme.W4A8, method, row_parallel=False)
        for level in LEVELS:
            _check(native.quantize(StoredRows(rows), 4, method is Method.MSE, 1, level), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("poison", [float("nan"), -float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("column", [0, 20, 44, 99])
def test_non_finite_rows_are_refused_by_number(dtype: torch.dtype, poison: float, column: int) -> None:
    rows = torch.randn(6, 100).to(dtype)
    rows[3, column] = poison
    rows[5] = poison
    for level, method, bits in product(LEVELS, DATA_FREE, (4, 8)):
        with pytest.raises(NonFiniteError) as caught:
            native.quantize(StoredRows(rows), bits, method is Method.MSE, 1, level)
        assert caught.value.row == 3


@pytest.mark.parametrize(("bits", "mse"), [(4, False), (4, True), (8, False)])
def test_fp8_nan_is_refused(bits: int, mse: bool) -> None:
    for byte in (0x7F, 0xFF):
        stored = torch.zeros(4, 200, dtype=torch.uint8)
        stored[2, 150] = byte
        rows = StoredRows(stored.view(torch.float8_e4m3fn), BlockScale(torch.ones(1, 2), 0, 128, 128))
        with pytest.raises(NonFiniteError) as caught:
            native.quantize(rows, bits, mse, 1)
        assert caught.value.row == 2


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 3e38])
def test_fp8_scales_that_are_not_finite_are_refused(scale: float) -> None:
    stored = torch.full((2, 256), 3.0).to(torch.float8_e4m3fn)
    rows = StoredRows(stored, BlockScale(torch.tensor([[1.0, scale]]), 0, 128, 128))
    for mse in (False, True):
        with pytest.raises(NonFiniteError):
            native.quantize(rows, 4, mse, 1)


def test_best_of_all_scales() -> None:
    """Against a search that shares nothing with the kernel: every breakpoint of short rows, in float64."""
    for seed in range(20):
        row = _rows("normal", 2, 24, 0, seed)
        got = native.quantize(StoredRows(row), 4, True, 1)
        w = row.double()
        for r in range(2):
            breakpoints = (w[r].abs()[:, None] / (torch.arange(1, 9) - 0.5)).flatten().sort().values
            scales = torch.cat([(breakpoints[1:] + breakpoints[:-1]) / 2, breakpoints * (1 + 1e-9)])
            q = (w[r] / scales[:, None]).round().clamp(-8, 7)
            a, b = (q * w[r]).sum(1), (q * q).sum(1)
            best = (w[r] ** 2).sum() - (a * a / b.clamp(min=1)).max()
            assert got.squared_error[r] <= best * (1 + 1e-5)


@pytest.mark.parametrize("method", DATA_FREE)
def test_subnormals_count_whatever_the_processor_was_told(method: Method) -> None:
    """FP8 rows of many subnormals, on a thread whose floats flush those of float32: the same, and so is the thread."""
    generator = torch.Generator().manual_seed(11)
    rows = (torch.randn(4, 256, generator=generator) * 0.02).to(torch.float8_e4m3fn)
    stored = StoredRows(rows, BlockScale(torch.rand(1, 2, generator=generator) + 0.1, 0, 128, 128))
    assert int((rows.float().abs() < 2**-6).sum()) > 100
    tiny = torch.tensor(2.0**-130)
    expected = quantize_rows(stored.to_float32(), Scheme.W4A8, method, row_parallel=False)
    for level in LEVELS:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot flush subnormals")
        try:
            got = native.quantize(stored, 4, method is Method.MSE, 1, level)
            assert float(tiny * 2) == 0
        finally:
            torch.set_flush_denormal(False)
        _check(got, expected)
