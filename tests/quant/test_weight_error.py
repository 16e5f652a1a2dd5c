"""Sums of squared errors and of squared weights, row by row, in parts."""

import numpy as np
import pytest
import torch

from npuq.quant import weight_error


@pytest.mark.parametrize("part", [1, 21, 1 << 16])
def test_sums_of_rows_are_those_of_float64(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_error, "_PART", part)
    source = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)) * 1e25  # squares leave float32
    quantized = source.bfloat16().float()
    errors, norms = weight_error.row_sums(quantized, source)
    expected = source.numpy().astype(np.float64)
    np.testing.assert_allclose(errors, ((quantized.numpy().astype(np.float64) - expected) ** 2).sum(1), rtol=1e-12)
    np.testing.assert_allclose(norms, (expected**2).sum(1), rtol=1e-12)


def test_no_rows_have_no_sums() -> None:
    assert [sums.shape for sums in weight_error.row_sums(torch.empty(0, 3), torch.empty(0, 3))] == [(0,), (0,)]
