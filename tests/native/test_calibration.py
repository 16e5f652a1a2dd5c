"""Calibration's kernels: the same bits at every level, the numbers of float64 numpy, nothing outside their memory."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npuq.native.calibration import LANES, NativeArithmetic, calibration_arithmetic

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

EACH = [NativeArithmetic(level) for level in LEVELS]
# Wider than one block of k, of rows and of columns of a product, and odd.
SHAPES = [(1, 1, 1), (13, 33, 7), (200, 5, 300), (3, 1540, 4), (12, 32, 256), (5, 7, 0), (0, 3, 2)]


def random(generator: np.random.Generator, *shape: int, offset: int = 0) -> Tensor:
    """Float32 numbers beginning `offset` numbers into their memory: nothing needs alignment."""
    memory = torch.from_numpy(generator.standard_normal(int(np.prod(shape)) + offset).astype(np.float32))
    return memory[offset:].view(*shape)


@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_product(m: int, n: int, k: int, transposed: tuple[bool, bool]) -> None:
    generator = np.random.default_rng(m + n + k)
    a = random(generator, k, m, offset=1).T if transposed[0] else random(generator, m, k, offset=1)
    b = random(generator, n, k, offset=2).T if transposed[1] else random(generator, k, n, offset=2)
    exact = a.double().numpy() @ b.double().numpy()
    bound = 1e-6 * (np.abs(a.numpy()) @ np.abs(b.numpy()) + 1)
    found = [each.product(a, b) for each in EACH]
    assert (np.abs(found[0].double().numpy() - exact) <= bound).all()
    # Into a part of a larger matrix, whose other numbers stay.
    start = random(generator, m, n + 3)
    subtracted = []
    for each in EACH:
        whole = start.clone()
        each.product(a, b, whole[:, 1 : n + 1], subtract=True)
        assert torch.equal(whole[:, :1], start[:, :1]) and torch.equal(whole[:, n + 1 :], start[:, n + 1 :])
        subtracted.append(whole)
    np.testing.assert_array_less(
        np.abs(subtracted[0][:, 1 : n + 1].double().numpy() - (start[:, 1 : n + 1].double().numpy() - exact)),
        bound + 1e-6 * np.abs(start[:, 1 : n + 1].numpy()) + 1e-9,
    )
    for one, other in ((found[0], found[-1]), (subtracted[0], subtracted[-1])):
        assert torch.equal(one, other)
    assert all(torch.equal(found[0], other) for other in found)


def test_rows_that_overlap_are_refused() -> None:
    """Their memory ends before that of as many rows side by side."""
    overlapping = torch.zeros(64).as_strided((4, 6), (1, 1))
    panel = torch.zeros(4, LANES)
    with pytest.raises(ValueError, match="float_product"):
        EACH[0].product(torch.ones(4, 2), torch.ones(2, 6), overlapping)
    with pytest.raises(ValueError, match="gptq_columns"):
        EACH[0].gptq_columns(
            overlapping[:, :4], 4, torch.ones(LANES), panel, panel.clone(), panel.clone(), panel.to(torch.int8)
        )
    assert not overlapping.any()


def test_a_product_does_not_depend_on_its_other_numbers() -> None:
    """Nor on the cut of k: the whole is the chain of its parts."""
    generator = np.random.default_rng(3)
    a, b = random(generator, 50, 700), random(generator, 700, 40)
    for each in EACH:
        whole = each.product(a, b)
        assert torch.equal(each.product(a[7:9], b[:, 5:6]), whole[7:9, 5:6])
        parts = each.product(-a[:, :123], b[:123])
        each.product(-a[:, 123:], b[123:].clone(), parts.neg_(), subtract=True)
        assert torch.equal(parts, whole)


def panel(generator: np.random.Generator, columns: int, rows: int) -> list[Tensor]:
    lower = random(generator, columns, columns + 5)[:, :columns].tril()
    lower.diagonal().abs_().add_(0.5)
    scale = torch.from_numpy(generator.uniform(0.05, 0.5, rows).astype(np.float32))
    return [lower, scale, random(generator, columns, rows), random(generator, columns, rows)]


@given(st.integers(1, 40), st.integers(0, 3), st.sampled_from([4, 8]), st.integers(0, 99))
def test_gptq_columns(columns: int, groups: int, bits: int, seed: int) -> None:
    lower, scale, weight, sums = panel(np.random.default_rng(seed), columns, groups * LANES)
    found = []
    for each in EACH:
        after, errors = sums.clone(), torch.empty_like(weight)
        codes = torch.empty(weight.shape, dtype=torch.int8)
        each.gptq_columns(lower, bits, scale, weight, after, errors, codes)
        found.append((codes, errors, after))
    codes, errors, after = found[0]
    for other in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(found[0], other, strict=True))
    bound = 2 ** (bits - 1)
    assert not codes.numel() or (int(codes.min()) >= -bound and int(codes.max()) < bound)
    # What each column was rounded from, given the codes behind it, in float64.
    lost = weight.double().numpy() - codes.numpy() * scale.double().numpy()
    matrix = lower.double().numpy()
    np.testing.assert_allclose(errors.numpy(), lost, atol=1e-5)
    expected = sums.double().numpy() + np.tril(matrix).T @ lost
    size = 1 + np.abs(sums.numpy()) + np.abs(matrix).T @ np.abs(lost)
    assert (np.abs(after.numpy() - expected) <= 1e-5 * size).all()
    before = expected - matrix.diagonal()[:, None] * lost
    wanted = (weight.double().numpy() + before / matrix.diagonal()[:, None]) / scale.double().numpy()
    nearest = np.clip(wanted, -bound, bound - 1)
    slack = 1e-5 * size / matrix.diagonal()[:, None] / scale.numpy()
    assert (np.abs(codes.numpy() - nearest) <= 0.5 + 2 * slack).all()


@pytest.mark.parametrize("columns", [1, 63, 64, 65, 256, 257, 600])
@pytest.mark.parametrize("bits", [4, 8])
def test_descend(columns: int, bits: int) -> None:
    generator = np.random.default_rng(columns)
    mix = random(generator, columns, columns + 4)
    hessian = mix @ mix.T / columns + 0.05 * torch.eye(columns)
    rows, scale = random(generator, 9, columns), torch.from_numpy(generator.uniform(0.2, 0.4, 9).astype(np.float32))
    start = (rows / scale[:, None]).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).to(torch.int8)
    found = []
    for each in EACH:
        codes = start.clone()
        gradient = each.product(rows - codes * scale[:, None], hessian)
        moves = each.descend(hessian, hessian.diagonal().reciprocal(), bits, scale, gradient, codes)
        found.append((moves, codes, gradient))
    moves, codes, gradient = found[0]
    for other in found[1:]:
        assert other[0] == moves and torch.equal(other[1], codes) and torch.equal(other[2], gradient)
    # A column is visited once: a move is a changed code.
    assert moves == int((codes != start).sum()) and (columns == 1 or moves > 0)
    lost = (rows.double() - codes.double() * scale.double()[:, None]).numpy()
    matrix = hessian.double().numpy()
    assert (np.abs(gradient.numpy() - lost @ matrix) <= 1e-5 * (1 + np.abs(lost) @ np.abs(matrix))).all()
    was = (rows.double() - start.double() * scale.double()[:, None]).numpy()
    for before, after in zip(was, lost, strict=True):
        assert after @ matrix @ after <= before @ matrix @ before * (1 + 1e-6)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_codes_stay_in_range_whatever_comes(poison: float) -> None:
    generator = np.random.default_rng(1)
    for position in range(4):
        parts = panel(generator, 20, LANES)
        parts[position].view(-1)[:0]  # each operand in turn
        parts[position][..., 3] = poison
        lower, scale, weight, sums = parts
        rows = weight.T.contiguous()
        for each in EACH:
            codes = torch.full(weight.shape, 99, dtype=torch.int8)
            each.gptq_columns(lower, 4, scale, weight, sums.clone(), torch.empty_like(weight), codes)
            assert int(codes.min()) >= -8 and int(codes.max()) <= 7
            codes = torch.zeros(rows.shape, dtype=torch.int8)
            each.descend(lower.contiguous(), lower[3].contiguous(), 4, scale, rows.clone(), codes)
            assert int(codes.min()) >= -8 and int(codes.max()) <= 7


def test_nothing_to_do() -> None:
    for each in EACH:
        assert each.descend(torch.empty(0, 0), torch.empty(0), 4, torch.ones(3), torch.empty(3, 0), _codes(3, 0)) == 0
        assert each.descend(torch.ones(2, 2), torch.ones(2), 4, torch.empty(0), torch.empty(0, 2), _codes(0, 2)) == 0
        each.gptq_columns(torch.empty(0, 0), 4, torch.ones(LANES), *3 * [torch.empty(0, LANES)], _codes(0, LANES))


def _codes(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.int8)


def _columns(**other: Tensor) -> None:
    arguments = {
        "lower": torch.eye(5),
        "bits": 4,
        "scale": torch.ones(LANES),
        "weight": torch.ones(5, LANES),
        "sums": torch.ones(5, LANES),
        "errors": torch.ones(5, LANES),
        "codes": _codes(5, LANES),
    }
    calibration_arithmetic().gptq_columns(**arguments | other)  # type: ignore[arg-type]


def _descend(**other: Tensor) -> None:
    arguments = {
        "hessian": torch.eye(5),
        "inverse_diagonal": torch.ones(5),
        "bits": 8,
        "scale": torch.ones(3),
        "gradient": torch.ones(3, 5),
        "codes": _codes(3, 5),
    }
    calibration_arithmetic().descend(**arguments | other)  # type: ignore[arg-type]


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> None:
    calibration_arithmetic().product(a, b, out)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda: _product(torch.ones(3, 4), torch.ones(5, 2)), r"float_product: b is float32 \[5, 2\]"),
        (lambda: _product(torch.ones(3, 4).double(), torch.ones(4, 2)), "float_product: a is float64"),
        (lambda: _product(torch.ones(3, 4, device="meta"), torch.ones(4, 2)), "float_product: a is .* on meta"),
        (lambda: _product(torch.ones(3, 4), torch.ones(4, 2), torch.ones(3, 3)), "float_product: out is"),
        (lambda: _product(torch.ones(3, 4), torch.ones(4, 2), torch.ones(2, 3).T), "float_product: out is"),
        (lambda: _columns(lower=torch.eye(4)), "gptq_columns: lower"),
        (lambda: _columns(lower=torch.ones(6, 5).T[:5, :5]), "gptq_columns: lower"),
        (lambda: _columns(scale=torch.ones(1)), "gptq_columns: scale"),
        (lambda: _columns(sums=torch.ones(LANES, 5).T), "gptq_columns: sums"),
        (lambda: _columns(errors=torch.ones(4, LANES)), "gptq_columns: errors"),
        (lambda: _columns(codes=torch.ones(5, LANES)), "gptq_columns: codes"),
        (lambda: _columns(bits=2), "gptq_columns: .* sizes"),  # type: ignore[arg-type]
        (
            lambda: _columns(
                scale=torch.ones(8),
                **{name: torch.ones(5, 8) for name in ("weight", "sums", "errors")},
                codes=_codes(5, 8),
            ),
            "gptq_columns: .* sizes",
        ),
        (lambda: _descend(hessian=torch.eye(4)), "descend: hessian"),
        (lambda: _descend(inverse_diagonal=torch.ones(4)), "descend: inverse_diagonal"),
        (lambda: _descend(scale=torch.ones(5)), "descend: scale"),
        (lambda: _descend(gradient=torch.ones(5, 3).T), "descend: gradient"),
        (lambda: _descend(codes=_codes(3, 6)), "descend: hessian"),
        (lambda: _descend(bits=3), "descend: .* sizes"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments_are_refused(refused: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refused()
