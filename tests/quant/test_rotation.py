"""Rotations are orthogonal at every size, spread energy as a Hadamard matrix does, and treat rows alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.quant.rotation import rotation


@given(st.integers(1, 400))
def test_orthogonal_at_every_size(size: int) -> None:
    matrix = rotation(size).matrix().numpy()
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-12)


@pytest.mark.parametrize("size", [64, 128, 1536, 2048, 384, 512, 640, 12, 20, 28, 36, 56])
def test_hadamard_where_there_is_one(size: int) -> None:
    """Sizes of the DeepSeek and Kimi models: every entry has the same magnitude, 1 / √size."""
    entries = rotation(size).matrix().abs() * size**0.5
    torch.testing.assert_close(entries, torch.ones_like(entries), rtol=0, atol=1e-12)


def test_hidden_size_of_v3_is_hadamard() -> None:
    rows = rotation(7168).rows(torch.eye(7168, dtype=torch.float64)[:3]).abs() * 7168**0.5
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [3, 7, 25, 100, 148])
def test_other_sizes_have_no_entry_far_above(size: int) -> None:
    assert float(rotation(size).matrix().abs().max()) * size**0.5 < 2**0.5 + 1e-9


def test_blocks_side_by_side_and_columns() -> None:
    """One weight may hold several vectors side by side (value heads): each is rotated by the same matrix."""
    one = rotation(24)
    x = torch.randn(5, 72, generator=torch.Generator().manual_seed(1))
    block = torch.block_diag(*[one.matrix()] * 3)
    torch.testing.assert_close(one.rows(x), x.double() @ block)
    torch.testing.assert_close(one.columns(x.T), block.T @ x.T.double())


@given(st.sampled_from([28, 64, 96, 128, 256, 512, 1536]), st.integers(0, 60), st.integers(1, 70))
def test_a_row_does_not_depend_on_its_neighbours(size: int, start: int, count: int) -> None:
    x = torch.randn(90, size, generator=torch.Generator().manual_seed(size))
    one = rotation(size)
    assert torch.equal(one.rows(x[start : start + count]), one.rows(x)[start : start + count])


def test_the_same_everywhere() -> None:
    """Artifacts made on different machines must be rotated alike: the signs of size 16, written down."""
    assert rotation(16).signs.tolist() == SIGNS_16


SIGNS_16 = [1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0]
