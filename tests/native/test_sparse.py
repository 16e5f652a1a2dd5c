"""Sparse attention at every level: selection exactly, scores and attention against float64, both layouts of pages."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npuq.runtime.attention.pools import LayerCache, Pool
from npuq.runtime.ops import Decode, SparseAttention
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.native.sparse_attention import NativeSparseAttention
from npuq.runtime.ops.reference import ReferenceOps

from .cases import LEVELS, attention_tolerance

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 16


@pytest.fixture(params=LEVELS, scope="module")
def all_ops(request: pytest.FixtureRequest) -> dict[torch.dtype, NativeOps]:
    return {dtype: NativeOps(dtype, threads=2, level=request.param) for dtype in DTYPES}


def sparse_of(ops: NativeOps) -> NativeSparseAttention:
    assert isinstance(ops.sparse, NativeSparseAttention)
    return ops.sparse


def golden_top_k(row: np.ndarray, seen: int, count: int) -> list[int]:
    """Sorted by numbers that rise with a score's rank, of equal ones the first."""
    order = sorted(range(seen), key=lambda i: (not np.isnan(row[i]), 0.0 if np.isnan(row[i]) else -row[i], i))
    chosen = sorted(order[:count])
    return chosen + [-1] * (count - len(chosen))


@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    cols=st.integers(1, 300),
    count=st.integers(0, 40),
    values=st.sampled_from(["few", "many", "special", "close"]),
)
def test_the_largest_are_selected_and_the_first_of_equals(
    all_ops: dict[torch.dtype, NativeOps], seed: int, rows: int, cols: int, count: int, values: str
) -> None:
    generator = np.random.default_rng(seed)
    scores = {
        "few": lambda: generator.integers(-2, 3, (rows, cols)) * 0.5,
        "many": lambda: generator.standard_normal((rows, cols)) * 10.0 ** generator.integers(-30, 30),
        "special": lambda: generator.choice([np.inf, -np.inf, np.nan, -np.nan, 0.0, -0.0, 1e-45, -1e-45], (rows, cols)),
        "close": lambda: np.nextafter(np.float32(1), generator.choice([0, 1, 2], (rows, cols)).astype(np.float32)),
    }[values]().astype(np.float32)
    seen = [int(n) for n in generator.integers(0, cols + 1, rows)]
    found = sparse_of(all_ops[torch.float32]).top_k(torch.from_numpy(scores), seen, count)
    assert found.tolist() == [golden_top_k(row, n, count) for row, n in zip(scores, seen, strict=True)]


@given(seed=st.integers(0, 2**31), cols=st.integers(1, 200), count=st.integers(1, 30))
def test_the_reference_selects_the_same(seed: int, cols: int, count: int) -> None:
    from npuq.runtime.ops.reference.sparse_attention import largest

    generator = np.random.default_rng(seed)
    scores = generator.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 1.0, 2.0, -1.0], (3, cols)).astype(np.float32)
    seen = [int(n) for n in generator.integers(0, cols + 1, 3)]
    unseen = torch.arange(cols) >= torch.tensor(seen)[:, None]
    found = largest(torch.from_numpy(scores), unseen, count)
    assert found.tolist() == [golden_top_k(row, n, count) for row, n in zip(scores, seen, strict=True)]


def batch(generator: np.random.Generator, lengths: list[tuple[int, int]]) -> Decode:
    """Sequences of (queries, keys) on blocks in random order."""
    needed = [-(-keys // BLOCK) for _, keys in lengths]
    blocks = iter(generator.permutation(sum(needed)).tolist())
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for row, count in zip(table, needed, strict=True):
        row[:count] = torch.tensor([next(blocks) for _ in range(count)], dtype=torch.int32)
    q_lens = tuple(np.cumsum([queries for queries, _ in lengths]).tolist())
    return Decode(q_lens, tuple(keys for _, keys in lengths), table)


def filled_cache(
    ops: NativeOps, generator: np.random.Generator, blocks: int, pools: dict[str, int], layout: str
) -> LayerCache:
    cache = ops.caches.new([Pool(name, width, layout=layout) for name, width in pools.items()], blocks, BLOCK)
    for name, width in pools.items():
        rows = torch.from_numpy(generator.standard_normal((blocks * BLOCK, width), dtype=np.float32)).to(ops.dtype)
        cache[name].write(torch.arange(blocks * BLOCK), rows)
    return cache


lengths_of_batches = st.lists(
    st.tuples(st.integers(1, 5), st.integers(0, 70)).map(lambda pair: (pair[0], pair[0] + pair[1])),
    min_size=1,
    max_size=3,
)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    seed=st.integers(0, 2**31),
    lengths=lengths_of_batches,
    heads=st.integers(1, 20),
    channels=st.integers(1, 70),
    count=st.integers(1, 30),
)
def test_index_scores(
    all_ops: dict[torch.dtype, NativeOps],
    dtype: torch.dtype,
    seed: int,
    lengths: list[tuple[int, int]],
    heads: int,
    channels: int,
    count: int,
) -> None:
    """Selected keys score at least as much as all others, by float64 sums of what the kernel was given."""
    ops, generator = all_ops[dtype], np.random.default_rng(seed)
    decode = batch(generator, lengths)
    cache = filled_cache(ops, generator, int(decode.block_table.max()) + 1, {"index_key": channels}, "nd")
    tokens = decode.num_tokens
    query = torch.from_numpy(generator.standard_normal((tokens, heads, channels), dtype=np.float32)).to(dtype)
    weights = torch.from_numpy(generator.standard_normal((tokens, heads), dtype=np.float32)).to(dtype)
    selected = sparse_of(ops).lightning_indexer(query, weights, cache["index_key"], decode, count)
    assert selected.shape == (tokens, 1, count)
    for (q0, q1), keys, blocks in zip(pairwise([0, *decode.q_lens]), decode.kv_lens, decode.block_table, strict=True):
        key = cache["index_key"].read(blocks, keys).double()
        scores = ((query[q0:q1].double() @ key.T).relu() * weights[q0:q1, :, None].double()).sum(1)
        for row, found, seen in zip(
            scores, selected[q0:q1, 0].tolist(), range(keys - (q1 - q0) + 1, keys + 1), strict=True
        ):
            chosen = [position for position in found if position >= 0]
            assert found == chosen + [-1] * (count - len(chosen))
            assert chosen == sorted(set(chosen))
            assert len(chosen) == min(count, seen)
            assert chosen[-1] < seen
            left = sorted(set(range(seen)) - set(chosen))
            if left:
                assert row[chosen].min() >= row[left].max() - 1e-4 * heads * channels**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nd", "nz"])
@given(
    seed=st.integers(0, 2**31),
    lengths=lengths_of_batches,
    heads=st.integers(1, 40),
    count=st.integers(1, 150),
    odd=st.booleans(),
)
def test_attention_to_selected_keys(
    all_ops: dict[torch.dtype, NativeOps],
    dtype: torch.dtype,
    layout: str,
    seed: int,
    lengths: list[tuple[int, int]],
    heads: int,
    count: int,
    odd: bool,
) -> None:
    ops, generator = all_ops[dtype], np.random.default_rng(seed)
    latent, rope = (40, 8) if odd and layout == "nd" else (48, 16)
    decode = batch(generator, lengths)
    cache = filled_cache(ops, generator, int(decode.block_table.max()) + 1, {"latent": latent, "rope": rope}, layout)
    tokens = decode.num_tokens
    q_latent, q_rope = (
        torch.from_numpy(generator.standard_normal((tokens, heads, width), dtype=np.float32)).to(dtype)
        for width in (latent, rope)
    )
    selected = torch.full((tokens, 1, count), -1, dtype=torch.int32)
    expected = []
    for (q0, q1), keys, blocks in zip(pairwise([0, *decode.q_lens]), decode.kv_lens, decode.block_table, strict=True):
        values = cache["latent"].read(blocks, keys).double()
        key = torch.cat([values, cache["rope"].read(blocks, keys).double()], -1)
        for token, seen in zip(range(q0, q1), range(keys - (q1 - q0) + 1, keys + 1), strict=True):
            chosen = generator.permutation(seen)[:count]
            selected[token, 0, : len(chosen)] = torch.from_numpy(chosen.astype(np.int32))
            scores = torch.cat([q_latent[token], q_rope[token]], -1).double() @ key[chosen].T * 0.2
            expected.append(scores.softmax(-1) @ values[chosen])
    out = sparse_of(ops).sparse_flash_attention(q_latent, q_rope, cache, decode, selected, 0.2)
    tolerance = attention_tolerance(dtype, values, ops.pool.level)
    torch.testing.assert_close(out.double(), torch.stack(expected), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_attention_on_nd_pages(all_ops: dict[torch.dtype, NativeOps], dtype: torch.dtype) -> None:
    """The same rows in both layouts; tiles of keys differ, and so the order of sums."""
    ops, generator = all_ops[dtype], np.random.default_rng(0)
    decode = batch(generator, [(1, 70), (3, 5), (2, 33)])
    blocks = int(decode.block_table.max()) + 1
    nd = filled_cache(ops, generator, blocks, {"latent": 48, "rope": 16}, "nd")
    nz = ops.caches.new([Pool("latent", 48), Pool("rope", 16)], blocks, BLOCK)
    for name, pages in nd.pages.items():
        nz[name].write(torch.arange(blocks * BLOCK), pages.tensor.flatten(0, 2))
    q_latent, q_rope = (torch.randn(6, 40, width).to(dtype) for width in (48, 16))
    both = [ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, 0.2) for cache in (nd, nz)]
    tolerance = attention_tolerance(dtype, nd["latent"].tensor.float(), ops.pool.level)
    torch.testing.assert_close(both[0], both[1], **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_results_do_not_depend_on_the_threads(all_ops: dict[torch.dtype, NativeOps], dtype: torch.dtype) -> None:
    ops, generator = all_ops[dtype], np.random.default_rng(1)
    decode = batch(generator, [(1, 3000), (4, 50)])
    pools = {"latent": 48, "rope": 16, "index_key": 32}
    cache = filled_cache(ops, generator, int(decode.block_table.max()) + 1, pools, "nd")
    query, weights = torch.randn(5, 16, 32).to(dtype), torch.randn(5, 16).to(dtype)
    q_latent, q_rope = torch.randn(5, 20, 48).to(dtype), torch.randn(5, 20, 16).to(dtype)

    def run(sparse: SparseAttention) -> tuple[Tensor, Tensor]:
        selected = sparse.lightning_indexer(query, weights, cache["index_key"], decode, 64)
        return selected, sparse.sparse_flash_attention(q_latent, q_rope, cache, decode, selected, 0.2)

    alone = sparse_of(NativeOps(dtype, threads=1, level=ops.pool.level))
    for left, right in zip(run(sparse_of(ops)), run(alone), strict=True):
        assert torch.equal(left, right)
    reference = ReferenceOps(dtype).sparse
    assert reference is not None
    golden = reference.lightning_indexer(query, weights, cache["index_key"], decode, 64)
    same = (golden == run(alone)[0]).float().mean()
    assert same > 0.9  # scores that agree to the last bits may change places


def test_scores_of_more_queries_than_fit_in_memory_at_once(all_ops: dict[torch.dtype, NativeOps]) -> None:
    """A chunk of 300 queries on 20000 keys: more than 4 million scores."""
    ops, generator = all_ops[torch.float32], np.random.default_rng(2)
    decode = batch(generator, [(300, 20000)])
    cache = filled_cache(ops, generator, int(decode.block_table.max()) + 1, {"index_key": 4}, "nd")
    query, weights = torch.randn(300, 2, 4), torch.randn(300, 2).abs()
    selected = sparse_of(ops).lightning_indexer(query, weights, cache["index_key"], decode, 50)
    key = cache["index_key"].read(decode.block_table[0], 20000)
    for token in (0, 208, 209, 210, 299):
        row = ((query[token] @ key.T).relu() * weights[token][:, None]).sum(0)[: 19700 + token + 1]
        assert len(set(row.topk(50).indices.tolist()) ^ set(selected[token, 0].tolist())) <= 2
