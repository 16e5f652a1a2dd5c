"""Packing: the byte layout that the engines read, and its inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.formats.int4 import pack_int4, unpack_int4


@given(st.integers(1, 9), st.integers(0, 17), st.integers(0, 2**32 - 1))
def test_byte_holds_row_2j_low_and_row_2j_plus_1_high(pairs: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(-8, 8, (2 * pairs, columns), dtype=np.int8)
    packed = pack_int4(torch.from_numpy(codes))
    expected = ((codes[0::2].astype(np.int16) & 15) + (codes[1::2].astype(np.int16) & 15) * 16).astype(np.uint8)
    np.testing.assert_array_equal(packed.numpy().view(np.uint8), expected)
    np.testing.assert_array_equal(unpack_int4(packed).numpy(), codes)


def test_every_byte_survives_unpack_and_pack() -> None:
    packed = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.int8)[None, :]
    assert torch.equal(pack_int4(unpack_int4(packed)), packed)


def test_odd_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows is odd"):
        pack_int4(torch.zeros(3, 4, dtype=torch.int8))
