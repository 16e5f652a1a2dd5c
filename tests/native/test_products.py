"""Integer products are exact at every size, address and level; float ones are close to float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from npuq.errors import BackendError
from npuq.formats.schemes import Scheme
from npuq.runtime.ops import LinearPart, Quantized
from npuq.runtime.ops.native import NativeOps

from .cases import LEVELS, part, product, quantized

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

SIZES = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 255, 300, 511, 515, 1030, 3525])


@pytest.fixture(params=LEVELS, scope="module")
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(threads=2, level=request.param)


@pytest.fixture(params=LEVELS, scope="module")
def bf16_ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(torch.bfloat16, threads=2, level=request.param)


@given(seed=st.integers(0, 2**31), m=st.integers(0, 60), n=st.integers(1, 50), k=SIZES, offset=st.integers(0, 3))
def test_w8a8_is_exact(ops: NativeOps, seed: int, m: int, n: int, k: int, offset: int) -> None:
    generator = np.random.default_rng(seed)
    parts = [part(generator, Scheme.W8A8, n, k, offset), part(generator, Scheme.W8A8, n // 2 + 1, k, 3 - offset)]
    x = quantized(generator, m, k, offset)
    np.testing.assert_array_equal(ops.products.linear(x, ops.weights.w8a8_linear(parts)).numpy(), product(x, parts))


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 4), st.integers(5, 20)), min_size=1, max_size=5),
    pairs=st.integers(1, 25),
    k=SIZES,
    offset=st.integers(0, 3),
)
def test_w4a8_experts_are_exact(ops: NativeOps, seed: int, counts: list[int], pairs: int, k: int, offset: int) -> None:
    generator = np.random.default_rng(seed)
    experts = [[part(generator, Scheme.W4A8, 2 * pairs, k, offset) for _ in range(2)] for _ in counts]
    x = quantized(generator, sum(counts), k, offset)
    out = ops.products.grouped_matmul(x, ops.weights.w4a8_experts(experts), torch.tensor(counts))
    starts = np.cumsum([0, *counts])
    for expert, first, last in zip(experts, starts, starts[1:], strict=False):
        rows = Quantized(x.codes[first:last], x.scale[first:last])
        np.testing.assert_array_equal(out[first:last].numpy(), product(rows, expert))


@pytest.mark.parametrize("scheme", [Scheme.W8A8, Scheme.W4A8])
@pytest.mark.parametrize("tokens", [1, 5, 8, 40])
@pytest.mark.parametrize("weight", [-128, 127, -1, 0x77])
@pytest.mark.parametrize("x", [-128, 127])
def test_extreme_codes_do_not_saturate(ops: NativeOps, scheme: Scheme, tokens: int, weight: int, x: int) -> None:
    k = 7168 + 5
    stored = LinearPart("extreme", scheme, torch.full((6, k), weight, dtype=torch.int8))
    rows = 12 if scheme is Scheme.W4A8 else 6
    stored = LinearPart("extreme", scheme, stored.weight, torch.ones(rows, 1))
    operand = Quantized(torch.full((tokens, k), x, dtype=torch.int8), torch.ones(tokens))
    handle = ops.weights.w4a8_experts([[stored]]) if scheme is Scheme.W4A8 else ops.weights.w8a8_linear([stored])
    out = ops.products.grouped_matmul(operand, handle, torch.tensor([tokens]))
    np.testing.assert_array_equal(out.numpy(), product(operand, [stored]))


@pytest.mark.parametrize("k", [31, 32, 40, 97, 1056, 2079])
@pytest.mark.parametrize("tokens", [6, 7, 8, 9, 16, 17])
def test_long_tasks_of_many_tokens_are_exact(ops: NativeOps, tokens: int, k: int) -> None:
    """A task takes more rows than share their own sums, and the last quad of rows is not whole."""
    generator = np.random.default_rng(k)
    stored = part(generator, Scheme.W8A8, 2070, k, 1)
    x = quantized(generator, tokens, k, 3)
    np.testing.assert_array_equal(
        ops.products.linear(x, ops.weights.w8a8_linear([stored])).numpy(), product(x, [stored])
    )


@given(
    seed=st.integers(0, 2**31),
    counts=st.lists(st.one_of(st.just(0), st.integers(1, 3), st.integers(4, 30)), min_size=1, max_size=12),
)
def test_groups_of_any_sizes_keep_their_places(ops: NativeOps, seed: int, counts: list[int]) -> None:
    """Tasks are not taken in the order of their groups."""
    generator = np.random.default_rng(seed)
    experts = [[part(generator, Scheme.W4A8, 130, 70)] for _ in counts]
    x = quantized(generator, sum(counts), 70)
    out = ops.products.grouped_matmul(x, ops.weights.w4a8_experts(experts), torch.tensor(counts))
    first = 0
    for expert, count in zip(experts, counts, strict=True):
        rows = Quantized(x.codes[first : first + count], x.scale[first : first + count])
        np.testing.assert_array_equal(out[first : first + count].numpy(), product(rows, expert))
        first += count


def test_sums_wider_than_float32_round_once(ops: NativeOps) -> None:
    """An accumulator above 2**24 becomes float32 once, after the last addition."""
    k = 4096
    codes = torch.full((1, k), 127, dtype=torch.int8)
    weight = torch.full((1, k), 127, dtype=torch.int8)
    weight[0, 0] = 126
    stored = LinearPart("wide", Scheme.W8A8, weight, torch.ones(1, 1))
    out = ops.products.linear(Quantized(codes, torch.ones(1)), ops.weights.w8a8_linear([stored]))
    assert out.item() == float(np.float32(127 * 127 * k - 127))


@given(
    seed=st.integers(0, 2**31),
    m=st.integers(1, 60),
    n=st.integers(1, 40),
    k=SIZES,
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_float_products(ops: NativeOps, seed: int, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    expected = x.double() @ weight.double().T
    # A float32 sum of k terms of size 1: the error grows with √k, and 1e-6 · k bounds it by far.
    out = ops.products.linear(x, ops.weights.float_linear([weight]))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6 * k)


@given(seed=st.integers(0, 2**31), m=st.integers(1, 20), n=st.integers(1, 40), k=SIZES)
def test_products_of_bf16_rows(bf16_ops: NativeOps, seed: int, m: int, n: int, k: int) -> None:
    """Some levels multiply them as they are. A row's outputs are the same bits whatever rows are beside it."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=generator).bfloat16()
    weight = torch.randn(n, k, generator=generator).bfloat16()
    handle = bf16_ops.weights.float_linear([weight])
    out = bf16_ops.products.linear(x, handle)
    torch.testing.assert_close(out.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-6 * k)
    row = seed % m
    assert torch.equal(bf16_ops.products.linear(x[row : row + 1], handle), out[row : row + 1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("tokens", "heads", "a", "b"), [(1, 3, 128, 512), (5, 2, 33, 70), (50, 1, 7, 3)])
def test_batch_matmul(ops: NativeOps, tokens: int, heads: int, a: int, b: int, transposed: bool) -> None:
    x = torch.randn(tokens, heads, a + 4)[..., 4:]
    weight = torch.randn(heads, b, a).bfloat16().transpose(1, 2) if transposed else torch.randn(heads, a, b).bfloat16()
    expected = torch.einsum("tna,nab->tnb", x.double(), weight.double())
    torch.testing.assert_close(ops.products.batch_matmul(x, weight).double(), expected, rtol=1e-5, atol=1e-4)


def test_results_do_not_depend_on_threads() -> None:
    generator = np.random.default_rng(0)
    experts = [[part(generator, Scheme.W4A8, 200, 320)] for _ in range(4)]
    x, counts = quantized(generator, 11, 320), torch.tensor([1, 0, 3, 7])
    outputs = [
        ops.products.grouped_matmul(x, ops.weights.w4a8_experts(experts), counts)
        for ops in (NativeOps(threads=threads) for threads in (1, 2, 5))
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_mismatched_parts_are_refused() -> None:
    generator = np.random.default_rng(0)
    ops = NativeOps(threads=1)
    with pytest.raises(BackendError, match="must be alike"):
        ops.weights.w8a8_linear([part(generator, Scheme.W8A8, 4, 8), part(generator, Scheme.W8A8, 4, 9)])
    with pytest.raises(BackendError, match="one shape"):
        ops.weights.w4a8_experts([[part(generator, Scheme.W4A8, 4, 8)], [part(generator, Scheme.W4A8, 6, 8)]])
    with pytest.raises(ValueError, match=r"matmul: x of 4x9 is int8 \[1, 8\] .* takes a contiguous int8 \[1, 9\]"):
        ops.products.linear(quantized(generator, 1, 8), ops.weights.w8a8_linear([part(generator, Scheme.W8A8, 4, 9)]))
