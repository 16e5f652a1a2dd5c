"""Quantizers against their definitions in numpy, what becomes of NaN, and attention against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import Decode
from npuq.runtime.ops.native import NativeOps

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")


@pytest.fixture(params=LEVELS, scope="module")
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(threads=2, level=request.param)


def _values(seed: int, rows: int, columns: int) -> np.ndarray:
    """float32 rows with exact ties among them: small whole numbers and halves beside random ones."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((rows, columns), dtype=np.float32)
    x[::2] = generator.integers(-254, 255, x[::2].shape) / np.float32(2)
    x[0, 0] = 127
    return x


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), columns=st.integers(1, 200))
def test_dynamic_quant(ops: NativeOps, seed: int, rows: int, columns: int) -> None:
    x = _values(seed, rows, columns)
    factor = np.float32(127) / np.abs(x).max(1)
    done = ops.norms.dynamic_quant(torch.from_numpy(x))
    np.testing.assert_array_equal(done.codes.numpy(), np.rint(x * factor[:, None]).astype(np.int8))
    np.testing.assert_array_equal(done.scale.numpy(), np.float32(1) / factor)


@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 9), columns=st.integers(1, 200))
def test_routed_rows_round_ties_away_from_zero(ops: NativeOps, seed: int, tokens: int, columns: int) -> None:
    x = _values(seed, tokens, columns)
    ids = torch.from_numpy(np.random.default_rng(seed).integers(0, 5, (tokens, 2), dtype=np.int32))
    scale = np.abs(x).max(1) / np.float32(127)
    quotient = (x / scale[:, None]).astype(np.float64)
    codes = np.sign(quotient) * np.floor(np.abs(quotient) + 0.5)
    done, row_index, counts = ops.routing.moe_init_routing(torch.from_numpy(x), ids, 5, quantize=True)
    order = np.argsort(ids.numpy().ravel(), kind="stable")
    np.testing.assert_array_equal(done.codes.numpy(), codes[order // 2].astype(np.int8))
    np.testing.assert_array_equal(done.scale.numpy(), scale[order // 2])
    np.testing.assert_array_equal(row_index.numpy()[order], np.arange(2 * tokens))
    np.testing.assert_array_equal(counts.numpy(), np.bincount(ids.numpy().ravel(), minlength=5))


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 9), half=st.integers(1, 200))
def test_swiglu_quant(ops: NativeOps, seed: int, rows: int, half: int) -> None:
    x = np.random.default_rng(seed).standard_normal((rows, 2 * half)) * 8
    x = x.astype(np.float32)
    left, right = x[:, :half].astype(np.float64), x[:, half:].astype(np.float64)
    y = left / (1 + np.exp(-left)) * right
    done = ops.norms.dequant_swiglu_quant(torch.from_numpy(x))
    scale = np.abs(y).max(1) / 127
    np.testing.assert_allclose(done.scale.numpy(), scale, rtol=1e-6)
    # exp is good to 2 ulp: a quotient that close to a tie may go either way.
    assert np.abs(done.codes.numpy() - y / scale[:, None]).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 17, 39])
def test_a_row_that_is_not_finite_becomes_nan_and_stays_alone(ops: NativeOps, poison: float, place: int) -> None:
    x = torch.randn(3, 40)
    x[1, place] = poison
    clean = ops.norms.dynamic_quant(x[[0, 2]])
    routed, row_index, _ = ops.routing.moe_init_routing(
        x, torch.tensor([[0], [1], [2]], dtype=torch.int32), 3, quantize=True
    )
    for done in (ops.norms.dynamic_quant(x), routed):
        assert done.scale[1].isnan()
        assert not done.codes[1].any()
        assert done.scale[[0, 2]].isfinite().all()
    assert torch.equal(ops.norms.dynamic_quant(x).codes[[0, 2]], clean.codes)
    assert row_index.tolist() == [0, 1, 2]


@pytest.mark.parametrize("size", [0.0, 1e-39])
def test_rows_too_small_to_scale_are_zero(ops: NativeOps, size: float) -> None:
    done = ops.norms.dynamic_quant(torch.full((1, 33), size))
    assert not done.codes.any()
    assert done.scale.item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [1, 5, 16])
def test_paged_attention_reads_the_cache_in_place(dtype: torch.dtype, heads: int) -> None:
    torch.manual_seed(0)
    latent_dim, rope_dim, block_size = 64, 32, 128
    decode = Decode((1, 4, 5), (1, 300, 128), torch.tensor([[3, 0, 0], [5, 1, 2], [4, 0, 0]], dtype=torch.int32))
    q_latent, q_rope = torch.randn(5, heads, latent_dim).to(dtype), torch.randn(5, heads, rope_dim).to(dtype)
    latent, rope = torch.randn(6 * block_size, latent_dim).to(dtype), torch.randn(6 * block_size, rope_dim).to(dtype)
    expected = torch.empty(5, heads, latent_dim, dtype=torch.float64)
    for token, (sequence, keys) in enumerate([(0, 1), (1, 298), (1, 299), (1, 300), (2, 128)]):
        slots = [int(decode.block_table[sequence, j // block_size]) * block_size + j % block_size for j in range(keys)]
        value, key = latent[slots].double(), torch.cat([latent[slots], rope[slots]], 1).double()
        query = torch.cat([q_latent[token], q_rope[token]], 1).double()
        expected[token] = (query @ key.T * 0.1).softmax(-1) @ value
    for level in LEVELS:
        ops = NativeOps(dtype, threads=2, level=level)
        cache = ops.caches.new((Pool("latent", latent_dim), Pool("rope", rope_dim)), 6, block_size)
        for pool, rows in ((cache["latent"].tensor, latent), (cache["rope"].tensor, rope)):
            # Token-major [slots, D] to NZ [blocks, D / 16, block_size, 16].
            pool.copy_(rows.view(6, block_size, -1, 16).transpose(1, 2))
        out = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, 0.1)
        tolerance = 1e-5 if dtype is torch.float32 else 1e-2
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
