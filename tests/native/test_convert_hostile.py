"""Rows and block scales of any bits: every level converts them as torch does, or refuses them as it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npuq.formats.schemes import Scheme, quantize_rows
from npuq.native import binding as native
from npuq.quant.scales import Method, NonFiniteError
from npuq.quant.stored_rows import BlockScale, StoredRows

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

DTYPES = [torch.float8_e4m3fn, torch.uint8, torch.bfloat16, torch.float16, torch.float32]


def _bits(generator: np.random.Generator, dtype: torch.dtype, kind: str, *shape: int) -> Tensor:
    """Values of random bits; "finite": without the two highest bits of the exponent."""
    memory = generator.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=np.uint8)
    if kind == "finite":
        memory[..., dtype.itemsize - 1 :: dtype.itemsize] &= 0x9F
    elif kind == "few":  # most are 0
        memory *= generator.random(memory.shape) < 0.05
    return torch.from_numpy(memory).view(dtype)


@pytest.mark.parametrize("method", [Method.MINMAX, Method.MSE])
@pytest.mark.parametrize("scheme", [Scheme.W4A8, Scheme.W8A8])
@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    kinds=st.tuples(*[st.sampled_from(["any", "finite", "few"])] * 2),
    pairs=st.integers(1, 2),
    columns=st.one_of(st.integers(1, 70), st.integers(71, 700)),
    block=st.tuples(st.integers(1, 5), st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 1000]))),
    first=st.integers(0, 4),
)
def test_any_bits(
    dtype: torch.dtype,
    scheme: Scheme,
    method: Method,
    seed: int,
    kinds: tuple[str, str],
    pairs: int,
    columns: int,
    block: tuple[int, int],
    first: int,
) -> None:
    generator = np.random.default_rng(seed)
    stored_columns = columns
    if dtype is torch.uint8:  # int4, two inputs a byte
        columns, block = 2 * columns, (block[0], 2 * block[1])
    rows, blocks = _bits(generator, dtype, kinds[0], 2 * pairs, stored_columns), None
    if dtype in (torch.float8_e4m3fn, torch.uint8):
        first %= block[0]
        shape = -(-(first + 2 * pairs) // block[0]), -(-columns // block[1])
        blocks = BlockScale(_bits(generator, torch.float32, kinds[1], *shape), first, *block)
    stored = StoredRows(rows, blocks)
    try:
        expected = quantize_rows(stored.to_float32(), scheme, method, row_parallel=False)
    except NonFiniteError as error:
        for level in LEVELS:
            with pytest.raises(NonFiniteError, match=f"row {error.row} "):
                native.quantize(stored, scheme.weight_bits, method is Method.MSE, 1, level)
        return
    for level in LEVELS:
        got = native.quantize(stored, scheme.weight_bits, method is Method.MSE, 1, level)
        assert torch.equal(got.codes, expected.tensors["weight"])
        assert torch.equal(got.scale, expected.tensors["weight_scale"])
        assert torch.equal(got.squared_error, expected.squared_error)
