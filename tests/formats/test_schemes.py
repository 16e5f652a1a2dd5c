"""The tensors of each scheme, recomputed in numpy."""

import numpy as np
import pytest
import torch

from npuq.dtypes import code_of
from npuq.formats.int4 import unpack_int4
from npuq.formats.schemes import OutputTensor, Scheme, dequantize, output_tensors, quantize_rows
from npuq.quant.scales import Method


@pytest.mark.parametrize("row_parallel", [False, True])
@pytest.mark.parametrize("scheme", [Scheme.W4A8, Scheme.W8A8])
def test_quantized_rows_are_what_the_format_says(scheme: Scheme, row_parallel: bool) -> None:
    rows = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    result = quantize_rows(rows, scheme, Method.MSE, row_parallel=row_parallel)
    described = {t.name: t for t in output_tensors("a.weight", scheme, (10, 64), row_parallel=row_parallel)}
    assert {f"a.{suffix}" for suffix in result.tensors} == set(described)
    for suffix, tensor in result.tensors.items():
        assert described[f"a.{suffix}"] == OutputTensor(f"a.{suffix}", code_of(tensor.dtype), tuple(tensor.shape))
    assert not result.tensors["weight_offset"].any()
    restored = dequantize(result.tensors, scheme)
    error = ((rows.double() - restored.double()) ** 2).sum(1)
    np.testing.assert_allclose(result.squared_error.numpy(), error.numpy(), rtol=1e-4)


@pytest.mark.parametrize(("row_parallel", "columns"), [(False, 1), (True, 16)])
def test_scale_bias_is_what_the_nibble_split_leaves(row_parallel: bool, columns: int) -> None:
    result = quantize_rows(torch.randn(6, 96), Scheme.W4A8, Method.MSE, row_parallel=row_parallel)
    codes = unpack_int4(result.tensors["weight"]).numpy().astype(np.int64)
    scale = result.tensors["weight_scale"].numpy().astype(np.float64)
    bias = result.tensors["scale_bias"].numpy()
    assert bias.shape == (6, columns)
    activation = np.random.default_rng(0).integers(-128, 128, (5, 96))
    high, low = np.floor_divide(activation, 16), activation % 16 - 8
    assert low.min() >= -8
    assert low.max() <= 7
    device = (16 * high @ codes.T + low @ codes.T) * scale.T + bias.astype(np.float64).sum(1)
    np.testing.assert_allclose(device, (activation @ codes.T) * scale.T, rtol=1e-5, atol=1e-5)
    slices = codes.reshape(6, columns, -1).sum(2)
    np.testing.assert_array_equal(bias, (8 * slices).astype(np.float32) * scale.astype(np.float32))


@pytest.mark.parametrize(
    ("scheme", "shape", "row_parallel", "message"),
    [
        (Scheme.W4A8, (5, 16), False, "odd"),
        (Scheme.W4A8, (4, 24), True, "not divisible by 16"),
        (Scheme.W8A8, (4,), False, "matrix"),
        (Scheme.FLOAT, (4, 4), False, "FLOAT"),
    ],
)
def test_impossible_shapes_are_refused(
    scheme: Scheme, shape: tuple[int, ...], row_parallel: bool, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        output_tensors("a.weight", scheme, shape, row_parallel=row_parallel)
