"""GPTQ against the formula it comes from: optimal brain surgeon, one column after another, in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npuq.quant.gptq import SingularHessianError, factor, gptq, output_error
from npuq.quant.refine import calibrated_codes, refine


def surgeon(weight: np.ndarray, hessian: np.ndarray, scale: np.ndarray, bits: int, damping: float) -> np.ndarray:
    """Each column in order of falling H_jj: round it, then move the others by the exact minimiser of the quadratic
    error given what is fixed, from the inverse of the Hessian of the columns that are left (Hassibi and Stork, 1993).
    """
    bound = 2 ** (bits - 1)
    damped = hessian + damping * np.mean(np.diag(hessian)) * np.eye(len(hessian))
    order = np.argsort(-np.diag(hessian), kind="stable")
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
    return inputs.T @ inputs / inputs.shape[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [1, 7, 64, 65, 150])
def test_codes_are_those_of_the_surgeon(columns: int, bits: int) -> None:
    weight, inputs, scale = problem(6, columns, 400)
    hessian = hessian_of(inputs)
    factored = factor(hessian)
    expected = surgeon(weight.numpy(), hessian.numpy(), scale.double().numpy(), bits, factored.damping)
    found = gptq(weight, factored, scale, bits).numpy()
    # A value within 1e-9 of a rounding boundary may fall on either side.
    assert (found != expected).mean() < 0.01
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [4, 8])
@given(columns=st.integers(1, 100), seed=st.integers(0, 1000))
def test_refined_codes_are_never_worse_than_rounding(columns: int, seed: int, bits: int) -> None:
    """Row for row, by the damped error that both minimise."""
    weight, inputs, scale = problem(8, columns, 300, seed)
    factored = factor(hessian_of(inputs))
    codes, scales = calibrated_codes(weight, factored, scale, bits)
    bound = 2 ** (bits - 1)
    rounded = (weight / scale[:, None]).round().clamp(-bound, bound - 1)
    for row in range(8):
        ours, theirs = (
            output_error(weight[row : row + 1], found[row : row + 1], factored.hessian)
            for found in (codes.double() * scales.double()[:, None], rounded.double() * scale.double()[:, None])
        )
        assert ours <= theirs * (1 + 1e-9)


@given(st.integers(1, 100), st.integers(0, 1000), st.integers(1, 4))
def test_refinement_only_descends(columns: int, seed: int, sweeps: int) -> None:
    weight, inputs, scale = problem(8, columns, 300, seed)
    factored = factor(hessian_of(inputs))
    start = gptq(weight, factored, scale, 4)
    codes, scales = refine(weight, factored.hessian, start, scale, 4, sweeps)
    assert codes.min() >= -8 and codes.max() <= 7 and bool((scales > 0).all())
    before = output_error(weight, start.double() * scale.double()[:, None], factored.hessian)
    after = output_error(weight, codes.double() * scales.double()[:, None], factored.hessian)
    assert after <= before * (1 + 1e-6)


def test_refined_codes_are_a_minimum_in_every_single_code() -> None:
    """With the scale they were found for: no code of a row can be changed for the better (checked by trying all)."""
    weight, inputs, scale = problem(3, 12, 300)
    factored = factor(hessian_of(inputs))
    codes, _ = refine(weight, factored.hessian, gptq(weight, factored, scale, 4), scale, 4, 1)
    for _ in range(20):  # until a sweep changes nothing; the scale is put back each time
        codes, _ = refine(weight, factored.hessian, codes, scale, 4, 1)
    best = output_error(weight, codes.double() * scale.double()[:, None], factored.hessian)
    for row in range(3):
        for column in range(12):
            for code in range(-8, 8):
                trial = codes.clone()
                trial[row, column] = code
                error = output_error(weight, trial.double() * scale.double()[:, None], factored.hessian)
                assert error >= best * (1 - 1e-9)


def test_uncorrelated_inputs_leave_plain_rounding() -> None:
    weight, _, scale = problem(5, 33, 1)
    codes = gptq(weight, factor(torch.eye(33, dtype=torch.float64)), scale, 4)
    assert torch.equal(codes, (weight.double() / scale.double()[:, None]).round().clamp(-8, 7).to(torch.int8))


def test_rows_are_independent() -> None:
    weight, inputs, scale = problem(20, 70, 200)
    factored = factor(hessian_of(inputs))
    whole = gptq(weight, factored, scale, 4)
    assert torch.equal(gptq(weight[4:11], factored, scale[4:11], 4), whole[4:11])


def test_fewer_tokens_than_channels_and_silent_channels() -> None:
    """The common case of a rare expert: damping makes the factorization possible."""
    weight, inputs, scale = problem(4, 50, 10)
    inputs[:, 7] = 0
    codes = gptq(weight, factor(hessian_of(inputs)), scale, 4)
    assert torch.equal(codes[:, 7], (weight[:, 7].double() / scale.double()).round().clamp(-8, 7).to(torch.int8))


def test_damping_raises_itself() -> None:
    """An indefinite matrix, as rounding may leave of a nearly singular one."""
    hessian = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    assert factor(hessian).damping == pytest.approx(0.1)


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(3, 3), torch.full((3, 3), float("nan")), torch.diag(torch.tensor([5.0, 1.0, -6.0]))],
    ids=["zero", "nan", "negative"],
)
def test_singular(hessian: Tensor) -> None:
    with pytest.raises(SingularHessianError):
        factor(hessian.double())


def test_output_error_is_that_of_the_outputs() -> None:
    weight, inputs, scale = problem(6, 30, 500)
    rounded = (weight / scale[:, None]).round() * scale[:, None]
    truth = inputs.double() @ weight.double().T
    lost = inputs.double() @ rounded.double().T - truth
    expected = float(lost.square().sum() / truth.square().sum())
    assert output_error(weight, rounded, hessian_of(inputs)) == pytest.approx(expected, rel=1e-5)
