"""Static W8A8 against the product that it stands for, computed in numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.dtypes import code_of
from npuq.formats.schemes import Scheme, output_tensors, quantize_rows
from npuq.formats.static_w8a8 import InputScale, input_scale_of, load_deq_scale, quant_bias, quantize_static
from npuq.quant.scales import Method

finite = st.floats(-1e4, 1e4, width=32)


def weight(rows: int = 12, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))


@given(finite, finite)
def test_the_grid_holds_the_range_and_zero(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    inputs = InputScale.of_range(low, high)
    assert -128 <= inputs.offset <= 127
    # Zero, which padding and masks are made of, has a code of its own; the ends are within half a step of the grid.
    assert inputs.scale * (-128 - inputs.offset) <= min(low, 0) + 0.51 * inputs.scale
    assert inputs.scale * (127 - inputs.offset) >= max(high, 0) - 0.51 * inputs.scale
    assert float(torch.tensor(inputs.scale, dtype=torch.bfloat16)) == inputs.scale
    wanted = max((max(high, 0) - min(low, 0)) / 255, 2.0**-23)
    assert wanted <= inputs.scale <= wanted * (1 + 2**-7)


@pytest.mark.parametrize(("low", "high"), [(float("nan"), 1.0), (0.0, float("inf")), (2.0, 1.0)])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="give no input scale"):
        InputScale.of_range(low, high)


@pytest.mark.parametrize("float16", [False, True])
def test_tensors_are_what_the_format_says(float16: bool) -> None:
    result = quantize_static(weight(), -1.5, 4.0, Method.MSE, float16=float16)
    described = output_tensors("a.weight", Scheme.W8A8_STATIC, (12, 64), row_parallel=True, float16=float16)
    stored = {f"a.{suffix}": (code_of(tensor.dtype), tuple(tensor.shape)) for suffix, tensor in result.tensors.items()}
    assert stored == {tensor.name: (tensor.dtype, tensor.shape) for tensor in described}
    dynamic = quantize_rows(weight(), Scheme.W8A8, Method.MSE, row_parallel=False)
    for suffix, tensor in dynamic.tensors.items():
        assert torch.equal(result.tensors[suffix], tensor)
    bits = result.tensors["deq_scale"].numpy()
    deq_scale = bits.astype(np.uint32).view(np.float32) if float16 else bits
    expected = dynamic.tensors["weight_scale"].numpy()[:, 0] * result.tensors["input_scale"].numpy()
    np.testing.assert_array_equal(deq_scale, expected)
    assert np.array_equal(load_deq_scale(result.tensors["deq_scale"]).numpy(), deq_scale)


def test_the_offset_leaves_the_product() -> None:
    result = quantize_static(weight(), -1.5, 4.0, Method.MINMAX).tensors
    inputs = input_scale_of(result)
    x = np.random.default_rng(1).uniform(-1.5, 4.0, (9, 64))
    codes = np.clip(np.rint(x / inputs.scale) + inputs.offset, -128, 127)
    product = codes @ result["weight"].numpy().astype(np.float64).T + result["quant_bias"].numpy()
    restored = (codes - inputs.offset) * inputs.scale
    exact = restored @ (result["weight"].numpy().astype(np.float64) * result["weight_scale"].numpy()).T
    np.testing.assert_allclose(product * result["deq_scale"].numpy(), exact, rtol=1e-6, atol=1e-9)
    assert np.abs(restored - x).max() <= inputs.scale / 2 * (1 + 1e-9)


def test_quant_bias_is_exact_at_its_largest() -> None:
    codes = torch.full((1, 1 << 17), -128, dtype=torch.int8)
    assert quant_bias(codes, 127).tolist() == [127 * 128 << 17]


@pytest.mark.parametrize(
    ("suffix", "value", "message"),
    [
        ("input_scale", 0.0, "input_scale 0.0 is not a positive number"),
        ("input_scale", float("nan"), "is not a positive number"),
        ("input_offset", 0.5, "input_offset 0.5 is not a whole number"),
        ("input_offset", 128.0, "is not a whole number between"),
        ("input_offset", float("nan"), "is not a whole number"),
    ],
)
def test_stored_input_scales_are_checked(suffix: str, value: float, message: str) -> None:
    tensors = {"input_scale": torch.tensor([0.5]), "input_offset": torch.tensor([3.0]), suffix: torch.tensor([value])}
    with pytest.raises(ValueError, match=message):
        input_scale_of(tensors)


def test_weights_alone_do_not_make_it() -> None:
    with pytest.raises(ValueError, match="range of its activations"):
        quantize_rows(weight(), Scheme.W8A8_STATIC, Method.MSE, row_parallel=False)
