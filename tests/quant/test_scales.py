"""Scales and codes: what each method promises, measured in numpy float64."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from npuq.formats.checkpoint import Checkpoint
from npuq.formats.sources.opening import open_weights
from npuq.quant.scales import Method, NonFiniteError, scale_rows

Rows = NDArray[np.float64]

DATA_FREE = [Method.MINMAX, Method.MSE]


def error_at(rows: Rows, scale: Rows, bits: int) -> Rows:
    """Squared error of each row quantized with the given scale, in float64."""
    bound = 2 ** (bits - 1)
    codes = np.clip(np.rint(rows / scale[:, None]), -bound, bound - 1)
    error: Rows = ((rows - scale[:, None] * codes) ** 2).sum(1)
    return error


def iterative_search(rows: Rows, bits: int) -> Rows:
    """Best error of: start from min-max, s ← Σ w·q / Σ q², requantize, keep the best, at most 50 rounds."""
    bound = 2 ** (bits - 1)
    scale = np.abs(rows).max(1) / (bound - 1)
    best = error_at(rows, scale, bits)
    for _ in range(50):
        codes = np.clip(np.rint(rows / scale[:, None]), -bound, bound - 1)
        scale = (rows * codes).sum(1) / (codes * codes).sum(1)
        best = np.minimum(best, error_at(rows, scale, bits))
    return best


def clip_grid(rows: Rows, bits: int) -> Rows:
    """Best error of 71 clipping ratios from 0.3 to 1."""
    largest = np.abs(rows).max(1) / (2 ** (bits - 1) - 1)
    return np.min([error_at(rows, largest * ratio, bits) for ratio in np.linspace(0.3, 1, 71)], axis=0)


def samples(example_fp8) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    source = open_weights(Checkpoint.open(example_fp8))
    normal = torch.randn(48, 1536, generator=generator)
    return {
        "normal": normal,
        "heavy": normal / torch.rand(48, 1536, generator=generator).clamp(min=1e-3).sqrt(),
        "outlier": torch.cat([normal[:, :-1], 40 * torch.ones(48, 1)], 1),
        "expert up": source.rows_float32("model.layers.2.mlp.experts.3.up_proj.weight", 0, 64),
        "expert down": source.rows_float32("model.layers.1.mlp.experts.0.down_proj.weight", 0, 64),
        "q_b": source.rows_float32("model.layers.2.self_attn.q_b_proj.weight", 0, 64),
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_beats_the_iterative_search_on_every_row_and_the_grid_on_average(bits: int, example_fp8) -> None:
    for name, rows in samples(example_fp8).items():
        result = scale_rows(rows, bits, Method.MSE)
        real = rows.double().numpy()
        error = ((real - result.scale.double().numpy()[:, None] * result.codes.double().numpy()) ** 2).sum(1)
        # A float32 scale and its float32 inverse move the error by rounding only.
        assert (error <= iterative_search(real, bits) * (1 + 1e-6)).all(), name
        assert error.mean() <= clip_grid(real, bits).mean(), name
        np.testing.assert_allclose(result.squared_error.numpy(), error, rtol=1e-4, err_msg=name)
        np.testing.assert_allclose(result.squared_norm.numpy(), (real**2).sum(1), rtol=1e-6, err_msg=name)


def test_mse_is_never_worse_than_any_scale_tried() -> None:
    rows = torch.randn(32, 700, generator=torch.Generator().manual_seed(3))
    error = scale_rows(rows, 4, Method.MSE).squared_error.numpy()
    real = rows.double().numpy()
    largest = np.abs(real).max(1) / 7
    for ratio in np.linspace(0.2, 1.3, 1500):
        assert (error <= error_at(real, largest * ratio, 4) * (1 + 1e-6)).all(), ratio


@pytest.mark.parametrize("bits", [4, 8])
def test_minmax_puts_the_largest_magnitude_on_the_largest_code(bits: int) -> None:
    rows = torch.randn(20, 333, generator=torch.Generator().manual_seed(1))
    result = scale_rows(rows, bits, Method.MINMAX)
    bound = 2 ** (bits - 1) - 1
    np.testing.assert_array_equal(result.scale.numpy(), rows.abs().amax(1).numpy() / np.float32(bound))
    expected = np.rint(rows.double().numpy() / result.scale.double().numpy()[:, None])
    # The float32 inverse may move a value across a rounding boundary: by one code, and rarely.
    difference = np.abs(result.codes.numpy() - expected)
    assert difference.max() <= 1
    assert difference.mean() < 1e-3
    assert (result.codes.abs().amax(1) == bound).all()


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["normal", "outlier", "on codes", "largest"])
def test_error_and_norm_are_told_to_half_a_unit_a_weight(kind: str, bits: int, method: Method) -> None:
    rows = torch.randn(20, 700, generator=torch.Generator().manual_seed(4))
    if kind == "outlier":
        rows[:, 0] *= 300
    elif kind == "on codes":
        rows = (rows.clamp(-3.5, 3.5) * 2).round() * 0.1
    elif kind == "largest":  # rounds up to the power of two above
        rows = rows.sign() * (2 - 2.0**-23)
    result = scale_rows(rows, bits, method)
    real = rows.double().numpy()
    error = ((real - result.scale.double().numpy()[:, None] * result.codes.double().numpy()) ** 2).sum(1)
    norm = (real**2).sum(1)
    # Rounding moves each weight by half a unit at most, and so the root of a sum over 700 of them by √700 times that.
    unit = 2.0 ** (-14 if bits == 4 and method is Method.MINMAX else -23) * 2.0 ** np.frexp(np.abs(real).max(1))[1]
    most = np.sqrt(rows.shape[1]) * unit / 2
    assert (np.abs(np.sqrt(result.squared_norm.numpy()) - np.sqrt(norm)) <= most * (1 + 1e-9)).all()
    # The sums are of the norm's size, and so is float64's rounding of them.
    told = result.squared_error.numpy()
    assert (told <= (np.sqrt(error) + most) ** 2 + 1e-14 * norm).all()
    assert (told >= np.maximum(np.sqrt(error) - most, 0) ** 2 - 1e-14 * norm).all()


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("bits", [4, 8])
def test_bytes_do_not_depend_on_chunks_or_threads(bits: int, method: Method) -> None:
    rows = torch.randn(61, 1000, generator=torch.Generator().manual_seed(2))
    whole = scale_rows(rows, bits, method)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        parts = [scale_rows(part, bits, method) for part in (rows[:1], rows[1:8], rows[8:])]
    finally:
        torch.set_num_threads(threads)
    for field in ("codes", "scale", "squared_error", "squared_norm"):
        assert torch.equal(getattr(whole, field), torch.cat([getattr(part, field) for part in parts])), field


@pytest.mark.parametrize("method", DATA_FREE)
@pytest.mark.parametrize("bits", [4, 8])
def test_extreme_rows_have_a_defined_outcome(bits: int, method: Method) -> None:
    rows = torch.zeros(6, 40)
    rows[1, 3] = 2.5
    rows[2] = 3e38
    rows[3, 0] = 1e-40
    rows[4] = torch.linspace(-1e-28, 1e-28, 40)
    rows[5, :2] = torch.tensor([-1.0, 1.0])
    result = scale_rows(rows, bits, method)
    assert torch.isfinite(result.scale).all()
    assert (result.scale > 0).all()
    assert result.scale[0] == result.scale[3] == 1
    assert not result.codes[0].any()
    assert not result.codes[3].any()
    restored = result.scale[:, None].double() * result.codes.double()
    assert torch.allclose(restored[1], rows[1].double(), rtol=1e-6)
    assert torch.allclose(restored[2], rows[2].double(), rtol=0.08)
    assert (restored[4] - rows[4].double()).abs().max() < 1e-28 / 6
    assert result.codes.shape == rows.shape


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_non_finite_rows_are_refused_by_number(bad: float) -> None:
    rows = torch.ones(5, 8)
    rows[3, 2] = bad
    with pytest.raises(NonFiniteError) as caught:
        scale_rows(rows, 4, Method.MSE)
    assert caught.value.row == 3


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(ValueError, match="float32"):
        scale_rows(torch.ones(2, 2, dtype=torch.bfloat16), 4, Method.MSE)
