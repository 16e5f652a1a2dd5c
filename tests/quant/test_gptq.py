"""GPTQ against the formula it comes from: optimal brain surgeon, one column after another, in float64 numpy; and its
refinement against trying every code."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npuq.native.calibration import NativeArithmetic
from npuq.native.library import levels
from npuq.parallel.pool import Inline
from npuq.quant import hessian as hessians
from npuq.quant.arithmetic import LANES, PANEL, Arithmetic, TorchArithmetic
from npuq.quant.gptq import gptq
from npuq.quant.hessian import Factor, Hessian, SingularHessianError
from npuq.quant.refine import calibrated_codes, output_error

INLINE = Inline(threading.Event())
ARITHMETICS = [TorchArithmetic(), *map(NativeArithmetic, levels())]
every_arithmetic = pytest.mark.parametrize("arithmetic", ARITHMETICS, ids=["torch", *levels()])
FASTEST = ARITHMETICS[-1]


def surgeon(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, bits: int, damping: float) -> np.ndarray:
    """Each column in order of falling H_jj: round it, then move the others by the exact minimiser of the quadratic
    error given what is fixed, from the inverse of the Hessian of the columns that are left (Hassibi and Stork, 1993).
    """
    bound = 2 ** (bits - 1)
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    order = np.argsort(np.diag(hessian), kind="stable")[::-1]
    rest, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape, np.int8)
    for position, column in enumerate(order):
        left = order[position:]
        inverse = np.linalg.inv(damped[np.ix_(left, left)])
        code = np.clip(np.round(rest[:, column] / scale), -bound, bound - 1)
        codes[:, column] = code
        error = (rest[:, column] - code * scale) / inverse[0, 0]
        rest[:, left] -= np.outer(error, inverse[0])
    return codes


def problem(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, correlated inputs and scales."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    inputs = torch.randn(tokens, columns, generator=generator) @ mix
    return weight, inputs, weight.abs().amax(1) / 7


def hessian_of(inputs: Tensor) -> Tensor:
    inputs = inputs.double()
    return (inputs.T @ inputs / inputs.shape[0]).float()


def factor(hessian: Tensor, arithmetic: Arithmetic = FASTEST) -> Factor:
    return hessians.factor(hessian, arithmetic, INLINE)


def greedy(weight: Tensor, factored: Factor, scale: Tensor, bits: int, arithmetic: Arithmetic = FASTEST) -> Tensor:
    """GPTQ's codes [N, K], in the weight's order."""
    count = -(-weight.shape[0] // LANES) * LANES
    rows, step = torch.zeros(count, weight.shape[1]), torch.ones(count)
    rows[: weight.shape[0]], step[: weight.shape[0]] = weight[:, factored.order], scale
    codes, _ = gptq(rows.T.contiguous(), factored, step, bits, arithmetic)
    result = torch.empty(weight.shape, dtype=torch.int8)
    result[:, factored.order] = codes.T[: weight.shape[0]]
    return result


def row_errors(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> np.ndarray:
    """(w − s·q)ᵀ·H·(w − s·q) of each row, in float64."""
    lost = (weight.double() - codes.double() * scale.double()[:, None]).numpy()
    return np.einsum("ni,ij,nj->n", lost, hessian.double().numpy(), lost)


def damped(factored: Factor) -> Tensor:
    """The damped Hessian in the weight's order."""
    back = factored.order.argsort()
    return factored.hessian[back][:, back]


@every_arithmetic
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 65, PANEL - 1, PANEL + 9])
def test_codes_are_those_of_the_surgeon(columns: int, bits: int, arithmetic: Arithmetic) -> None:
    weight, inputs, scale = problem(6, columns, 400)
    hessian = hessian_of(inputs)
    factored = factor(hessian, arithmetic)
    expected = surgeon(weight.numpy(), hessian.double().numpy(), scale.double().numpy(), bits, factored.damping)
    found = greedy(weight, factored, scale, bits, arithmetic).numpy()
    # A value within rounding of a boundary may fall on either side, and changes those after it.
    assert (found != expected).mean() < 0.01
    assert np.abs(found.astype(int) - expected).max() <= 1


@every_arithmetic
@pytest.mark.parametrize("tokens", [1, 40, 900])
def test_factor_is_numpys(tokens: int, arithmetic: Arithmetic) -> None:
    _, inputs, _ = problem(1, PANEL + 44, tokens)
    inputs *= torch.logspace(-2, 2, inputs.shape[1])  # channels of very different size
    factored = factor(hessian_of(inputs), arithmetic)
    assert torch.equal(factored.hessian.diagonal().sort().values, factored.hessian.diagonal())
    expected = np.linalg.cholesky(factored.hessian.double().numpy())
    # Relative to each row's norm: what rounding is relative to.
    error = np.abs(factored.lower.numpy() - expected).max(1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 1e-3
    assert float(factored.lower.triu(1).abs().max()) == 0


@every_arithmetic
@pytest.mark.parametrize("bits", [4, 8])
def test_errors_and_norms_are_those_of_the_outputs(bits: int, arithmetic: Arithmetic) -> None:
    weight, inputs, scale = problem(21, 300, 200)
    hessian = hessian_of(inputs)
    found = calibrated_codes(weight, factor(hessian, arithmetic), scale, bits, arithmetic)
    lost = row_errors(weight, found.codes, found.scale, hessian)
    whole = row_errors(weight, torch.zeros_like(found.codes), scale, hessian)
    np.testing.assert_allclose(found.squared_error.numpy(), lost, rtol=2e-3)
    np.testing.assert_allclose(found.squared_norm.numpy(), whole, rtol=1e-4)


@pytest.mark.parametrize("bits", [4, 8])
@given(columns=st.integers(1, 100), seed=st.integers(0, 1000))
def test_calibrated_codes_are_never_worse_than_rounding_or_gptq(columns: int, seed: int, bits: int) -> None:
    """Row for row, by the damped error that all minimize."""
    weight, inputs, scale = problem(8, columns, 300, seed)
    factored = factor(hessian_of(inputs))
    found = calibrated_codes(weight, factored, scale, bits, FASTEST)
    bound = 2 ** (bits - 1)
    assert int(found.codes.min()) >= -bound and int(found.codes.max()) < bound
    assert bool((found.scale > 0).all())
    rounded = (weight / scale[:, None]).round().clamp(-bound, bound - 1)
    ours = row_errors(weight, found.codes, found.scale, damped(factored))
    for codes in (rounded, greedy(weight, factored, scale, bits)):
        assert (ours <= row_errors(weight, codes, scale, damped(factored)) * (1 + 1e-4) + 1e-12).all()


@every_arithmetic
def test_calibrated_codes_are_a_minimum_in_every_single_code(arithmetic: Arithmetic) -> None:
    """With the scale they were found for: no code of a row can be changed for the better (checked by trying all)."""
    weight, inputs, scale = problem(3, 12, 300)
    factored = factor(hessian_of(inputs), arithmetic)
    step, rows = torch.ones(LANES), torch.zeros(LANES, 12)
    step[:3], rows[:3] = scale, weight[:, factored.order]
    codes = torch.zeros(LANES, 12, dtype=torch.int8)
    gradient = rows @ factored.hessian
    sweeps = 0
    while arithmetic.descend(factored.hessian, factored.hessian.diagonal().reciprocal(), 4, step, gradient, codes):
        sweeps += 1
    assert 1 <= sweeps < 30
    lost = rows - codes * step[:, None]
    torch.testing.assert_close(gradient, lost @ factored.hessian, rtol=1e-3, atol=1e-4)
    best = row_errors(rows[:3], codes[:3], scale, factored.hessian)
    for column in range(12):
        for code in range(-8, 8):
            trial = codes[:3].clone()
            trial[:, column] = code
            assert (row_errors(rows[:3], trial, scale, factored.hessian) >= best * (1 - 1e-5)).all()


def test_plain_rounding_stays_where_it_is_better() -> None:
    """The codes of GPTQ alone, where clipping spoils its compensation; with a scale far too small everything clips."""
    weight, inputs, scale = problem(32, 40, 300)
    factored, scale = factor(hessian_of(inputs)), scale / 30
    rounded = (weight / scale[:, None]).round().clamp(-8, 7).to(torch.int8)
    plain = row_errors(weight, rounded, scale, damped(factored))
    alone = row_errors(weight, greedy(weight, factored, scale, 4), scale, damped(factored))
    assert (alone > plain).any()
    found = calibrated_codes(weight, factored, scale, 4, FASTEST, 0)
    assert (row_errors(weight, found.codes, found.scale, damped(factored)) <= plain * (1 + 1e-4)).all()


@every_arithmetic
def test_a_factor_of_no_numbers_leaves_plain_rounding(arithmetic: Arithmetic) -> None:
    """Whatever goes wrong behind it: the codes are still in range, and each row's are those of plain rounding."""
    weight, inputs, scale = problem(5, 30, 60)
    factored = factor(hessian_of(inputs), arithmetic)
    factored.lower[20, 3] = float("nan")
    found = calibrated_codes(weight, factored, scale, 4, arithmetic)
    assert torch.equal(found.codes, (weight * scale.reciprocal()[:, None]).round().clamp(-8, 7).to(torch.int8))
    assert torch.equal(found.scale, scale)


@every_arithmetic
def test_uncorrelated_inputs_leave_plain_rounding(arithmetic: Arithmetic) -> None:
    weight, _, scale = problem(5, 33, 1)
    codes = greedy(weight, factor(torch.eye(33), arithmetic), scale, 4, arithmetic)
    assert torch.equal(codes, (weight * scale.reciprocal()[:, None]).round().clamp(-8, 7).to(torch.int8))


@every_arithmetic
def test_rows_are_independent(arithmetic: Arithmetic) -> None:
    weight, inputs, scale = problem(40, 270, 200)
    factored = factor(hessian_of(inputs), arithmetic)
    whole = calibrated_codes(weight, factored, scale, 4, arithmetic)
    part = calibrated_codes(weight[4:21], factored, scale[4:21], 4, arithmetic)
    if arithmetic is ARITHMETICS[0]:  # torch's products depend on their shape in the last bits
        assert float((part.codes != whole.codes[4:21]).float().mean()) < 0.01
    else:
        assert torch.equal(part.codes, whole.codes[4:21])
        torch.testing.assert_close(part.scale, whole.scale[4:21], rtol=1e-6, atol=0)


def test_fewer_tokens_than_channels_and_silent_channels() -> None:
    """The common case of a rare expert: damping makes the factorization possible."""
    weight, inputs, scale = problem(4, 50, 10)
    inputs[:, 7] = 0
    factored = factor(hessian_of(inputs))
    plain = (weight[:, 7] * scale.reciprocal()).round().clamp(-8, 7).to(torch.int8)
    assert torch.equal(greedy(weight, factored, scale, 4)[:, 7], plain)
    # What damping and silent channels add is in neither error nor norm.
    found = calibrated_codes(weight, factored, scale, 4, FASTEST)
    lost = row_errors(weight, found.codes, found.scale, hessian_of(inputs))
    np.testing.assert_allclose(found.squared_error.numpy(), lost, rtol=1e-2)


@every_arithmetic
@pytest.mark.parametrize(("tokens", "columns"), [(4100, 20), (5, 1030)], ids=["tokens", "columns"])
def test_hessian_is_the_sum_of_all_rows(tokens: int, columns: int, arithmetic: Arithmetic) -> None:
    """Of more rows, or more columns, than one product takes."""
    inputs = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0))
    found = Hessian(columns, arithmetic)
    for part in (inputs[:-1], inputs[-1:]):
        found.add(part, INLINE)
        assert torch.equal(found.symmetric(), found.symmetric().T)
    assert found.rows == tokens
    expected = inputs.double().T @ inputs.double()
    assert float((found.symmetric() - expected).abs().max()) < 1e-5 * float(expected.diagonal().max())


def test_hessian_without_rows_is_zero() -> None:
    empty = Hessian(3, FASTEST)
    empty.add(torch.empty(0, 3), INLINE)
    assert empty.rows == 0 and torch.equal(empty.symmetric(), torch.zeros(3, 3))


def test_damping_raises_itself() -> None:
    """An indefinite matrix, as rounding may leave of a nearly singular one."""
    assert factor(torch.diag(torch.tensor([1.0, 1.0, -0.05]))).damping == pytest.approx(0.1)


def test_float64_takes_over_where_float32_rounds_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pivot below the damping is rounding's: H + λ·I has none without."""
    _, inputs, _ = problem(1, 30, 60)
    plain = factor(hessian_of(inputs))

    def rounds(matrix: Tensor, arithmetic: Arithmetic, mapper: object) -> Tensor:
        lower = torch.linalg.cholesky(matrix)
        lower[5, 5] = 1e-6
        return lower

    monkeypatch.setattr(hessians, "cholesky", rounds)
    found = factor(hessian_of(inputs))
    assert found.damping == plain.damping
    torch.testing.assert_close(found.lower, plain.lower, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(3, 3), torch.full((3, 3), float("nan")), torch.diag(torch.tensor([5.0, 1.0, -6.0]))],
    ids=["zero", "nan", "negative"],
)
def test_singular(hessian: Tensor) -> None:
    with pytest.raises(SingularHessianError):
        factor(hessian)


@every_arithmetic
def test_output_error_is_that_of_the_outputs(arithmetic: Arithmetic) -> None:
    weight, inputs, scale = problem(6, 30, 500)
    rounded = (weight / scale[:, None]).round() * scale[:, None]
    truth = inputs.double() @ weight.double().T
    lost = inputs.double() @ rounded.double().T - truth
    found, norm = output_error(weight, rounded, hessian_of(inputs), arithmetic)
    assert found == pytest.approx(float(lost.square().sum()) / 500, rel=1e-4)
    assert norm == pytest.approx(float(truth.square().sum()) / 500, rel=1e-4)
