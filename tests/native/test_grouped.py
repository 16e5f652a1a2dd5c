"""Grouped-query attention at every level against float64: pages, arrays, both layouts, codes, spans, whole blocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.runtime.attention.pools import LayerCache, Pool
from npuq.runtime.ops import Decode, GqaConfig, GqaParts, Lengths, LinearPart, Ops, Positions, Step
from npuq.runtime.ops.grouped_attention import KEY, VALUE
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.native.grouped_attention import NativeGqa
from npuq.runtime.ops.reference import ReferenceOps

from .cases import LEVELS

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

DTYPES = [torch.float32, torch.bfloat16]
BLOCK = 16
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=LEVELS, scope="module")
def all_ops(request: pytest.FixtureRequest) -> dict[torch.dtype, NativeOps]:
    return {dtype: NativeOps(dtype, threads=2, level=request.param) for dtype in DTYPES}


def golden(query: Tensor, key: Tensor, value: Tensor, past: int, scale: float) -> Tensor:
    """float64 attention of one sequence: query `[Q, N, d]`, key and value `[S, K, d]`; query i sees past + i + 1."""
    group = query.shape[1] // key.shape[1]
    wide = [each.double().repeat_interleave(group, dim=1) for each in (key, value)]
    scores = torch.einsum("qnd,snd->nqs", query.double(), wide[0]) * scale
    seen = torch.arange(len(key)) <= torch.arange(len(query))[:, None] + past
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("nqs,snd->qnd", weights, wide[1])


def paged(ops: Ops, key: Tensor, value: Tensor, **changes: object) -> tuple[LayerCache, Tensor]:
    """Pages with keys and values `[S, K, d]` of one sequence, and its block table, which is no order."""
    count = -(-len(key) // BLOCK)
    pools = [replace(Pool(name, key[0].numel(), layout="nd"), **changes) for name in (KEY, VALUE)]  # type: ignore[arg-type]
    cache = ops.caches.new(pools, count + 1, BLOCK)
    table = (torch.arange(count, dtype=torch.int32) * 7 + 3) % count if count % 7 else torch.arange(count).int().flip(0)
    slots = table.long().repeat_interleave(BLOCK)[: len(key)] * BLOCK + torch.arange(len(key)) % BLOCK
    ops.gqa.scatter_pa_kv_cache(key, value, cache, slots)
    return cache, table[None]


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 80)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 8]),
    width=st.integers(1, 70),
    causal=st.booleans(),
)
def test_ragged_sequences(
    all_ops: dict[torch.dtype, NativeOps],
    seed: int,
    lengths: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    width: int,
    causal: bool,
) -> None:
    torch.manual_seed(seed)
    q_ends = torch.tensor([q for q, _ in lengths]).cumsum(0).tolist()
    kv_ends = torch.tensor([kv for _, kv in lengths]).cumsum(0).tolist()
    query = torch.randn(q_ends[-1], kv_heads * group, width)
    key, value = torch.randn(2, kv_ends[-1], kv_heads, width)
    ops = all_ops[torch.float32].gqa
    out = ops.fused_infer_attention(query, key, value, Lengths(q_ends, kv_ends, causal), 0.3)
    for (q0, q1), (k0, k1) in zip(pairwise([0, *q_ends]), pairwise([0, *kv_ends]), strict=True):
        past = (k1 - k0) - (q1 - q0) if causal else k1 - k0
        expected = golden(query[q0:q1], key[k0:k1], value[k0:k1], past, 0.3)
        torch.testing.assert_close(out[q0:q1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["nd", "nz"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "width"),
    [
        (1, 1, 8, 2, 32),
        (1, 37, 8, 1, 48),
        (1, 1024, 4, 2, 32),
        (1, 1025, 4, 2, 32),
        (1, 2500, 6, 3, 16),
        (40, 75, 8, 2, 32),
    ],
)
def test_pages(
    all_ops: dict[torch.dtype, NativeOps],
    dtype: torch.dtype,
    layout: str,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    width: int,
) -> None:
    """Up to one span of keys, and several."""
    torch.manual_seed(keys)
    ops = all_ops[dtype]
    query = torch.randn(queries, heads, width).to(dtype)
    key, value = torch.randn(2, keys, kv_heads, width).to(dtype)
    cache, table = paged(ops, key, value, layout=layout)
    out = ops.gqa.fused_infer_attention_paged(query, cache, Decode((queries,), (keys,), table), 0.4)
    expected = golden(query, key, value, keys - queries, 0.4)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes(all_ops: dict[torch.dtype, NativeOps], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    ops, key, value = all_ops[dtype], *torch.randn(2, 90, 2, 32).to(dtype)
    query, scales = torch.randn(3, 4, 32).to(dtype), {KEY: torch.full((64,), 0.03), VALUE: torch.full((64,), 0.02)}
    pools = [Pool(name, 64, int8=True, layout="nz") for name in (KEY, VALUE)]
    cache = ops.caches.new(pools, 6, BLOCK, scales)
    ops.gqa.scatter_pa_kv_cache(key, value, cache, torch.arange(90))
    read = ops.gqa.as_cached(key, value, cache)
    decode = Decode((3,), (90,), torch.arange(6, dtype=torch.int32)[None])
    out = ops.gqa.fused_infer_attention_paged(query, cache, decode, 0.2)
    torch.testing.assert_close(
        out.double(), golden(query, *read, 87, 0.2), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [8, 4, 2])
def test_results_depend_on_no_other_head_and_no_thread(heads: int, dtype: torch.dtype) -> None:
    """A rank that has some of the heads gives their bits, and so do other numbers of threads."""
    torch.manual_seed(2)
    key, value = torch.randn(2, 3000, 2, 64).to(dtype)
    query, found = torch.randn(1, 8, 64).to(dtype), []
    for threads, some in ((1, 8), (3, heads)):
        ops = NativeOps(dtype, threads=threads)
        kv = slice(0, max(1, some * 2 // 8))
        cache, table = paged(ops, key[:, kv], value[:, kv])
        decode = Decode((1,), (3000,), table)
        found.append(ops.gqa.fused_infer_attention_paged(query[:, :some], cache, decode, 0.1)[:, :heads])
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", ["key", "value"])
def test_a_value_that_is_no_number_stays_with_those_that_see_it(
    all_ops: dict[torch.dtype, NativeOps], place: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(3)
    query = torch.randn(40, 4, 32).to(dtype)
    rows = dict(zip((KEY, VALUE), torch.randn(2, 40, 2, 32).to(dtype), strict=True))
    rows[place][20, 1, 3] = torch.nan
    lengths = Lengths((40,), (40,), causal=True)
    out = all_ops[dtype].gqa.fused_infer_attention(query, rows[KEY], rows[VALUE], lengths, 0.2)
    assert out[:20].isfinite().all() and out[:, :2].isfinite().all()
    assert out[20:, 2:].isnan().any(-1).all()


def parts(scheme: Scheme, heads: int, kv_heads: int, width: int, biased: bool, normed: bool) -> GqaParts:
    def linear(outputs: int, inputs: int) -> LinearPart:
        if scheme is Scheme.FLOAT:
            return LinearPart("w", scheme, torch.randn(outputs, inputs) / inputs**0.5)
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return LinearPart("w", scheme, codes, torch.full((outputs, 1), 0.001))

    q, kv, hidden = heads * width, kv_heads * width, 48
    return GqaParts(
        linear(q, hidden),
        linear(kv, hidden),
        linear(kv, hidden),
        linear(hidden, q),
        (torch.randn(q), torch.randn(kv), torch.randn(kv)) if biased else None,
        1 + torch.randn(width) / 5 if normed else None,
        1 + torch.randn(width) / 5 if normed else None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W8A8])
@pytest.mark.parametrize(("rope", "biased", "normed"), [(32, False, True), (16, True, True), (16, True, False)])
def test_a_whole_block_is_its_operators(
    all_ops: dict[torch.dtype, NativeOps], dtype: torch.dtype, scheme: Scheme, rope: int, biased: bool, normed: bool
) -> None:
    """In one call, in several, and as the reference computes it; slots −1 are not written."""
    torch.manual_seed(4)
    config = GqaConfig(6, 2, 32, rope, 1e-6, 32**-0.5)
    stored, x = parts(scheme, 6, 2, 32, biased, normed), torch.randn(5, 48).to(dtype)
    angles = torch.randn(5, rope // 2).repeat(1, 2)
    positions = Positions(torch.tensor([20, 2, 3, 4, 40]), angles.cos().to(dtype), angles.sin().to(dtype))
    table = torch.tensor([[1, 0], [0, 0], [2, 0]], dtype=torch.int32)
    step = Step(torch.zeros(5), positions, Decode((1, 4, 5), (5, 5, 9), table), None, None)
    results = []
    for ops in (all_ops[dtype], all_ops[dtype], ReferenceOps(dtype)):
        gqa, cache = (
            ops.gqa.load(stored, config),
            paged(ops, *torch.randn(2, 48, 2, 32, generator=_seeded()).to(dtype))[0],
        )
        if len(results) == 1:
            gqa = replace(gqa, one_call=False)  # type: ignore[call-arg]
        assert len(results) != 0 or (isinstance(gqa, NativeGqa) and gqa.one_call)
        out = ops.gqa.decode(x, gqa, cache, step)
        skipped = ops.gqa.write(x, gqa, cache, replace(positions, slots=torch.full((5,), -1)))
        results.append((out, cache[KEY].tensor, cache[VALUE].tensor, *skipped))
    for one, several in zip(*results[:2], strict=True):
        assert torch.equal(one, several)
    for ours, theirs in zip(results[0], results[2], strict=True):
        # Codes of a float that rounds otherwise differ by one.
        error = (ours.float() - theirs.float()).norm() / theirs.float().norm()
        assert float(error) < (1e-5 if dtype is torch.float32 and scheme is Scheme.FLOAT else 2e-2)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


CONFIG = GqaConfig(4, 2, 16, 16, 1e-6, 0.25)
TABLE = torch.tensor([[0, 1], [2, 0], [3, 0]], dtype=torch.int32)


def _pages(ops: NativeOps, channels: int = 32, blocks: int = 4, names: tuple[str, ...] = (KEY, VALUE)) -> LayerCache:
    return ops.caches.new([Pool(name, channels, layout="nd") for name in names], blocks, BLOCK)


def _attend(ops: NativeOps, cache: LayerCache | None = None, heads: int = 4, **changes: object) -> Tensor:
    decode = replace(Decode((1, 2, 3), (17, 5, 16), TABLE), **changes)  # type: ignore[arg-type]
    return ops.gqa.fused_infer_attention_paged(torch.ones(3, heads, 16), cache or _pages(ops), decode, 0.2)


def _ragged(ops: NativeOps, query: Tensor | None = None, value: Tensor | None = None, **changes: object) -> Tensor:
    query = torch.ones(3, 4, 16) if query is None else query
    value = torch.ones(5, 2, 16) if value is None else value
    lengths = replace(Lengths((1, 3), (2, 5), causal=True), **changes)  # type: ignore[arg-type]
    return ops.gqa.fused_infer_attention(query, torch.ones(5, 2, 16), value, lengths, 0.2)


def _block(
    ops: NativeOps,
    x: Tensor | None = None,
    cache: LayerCache | None = None,
    config: GqaConfig = CONFIG,
    **changes: object,
) -> Tensor:
    torch.manual_seed(6)
    gqa = ops.gqa.load(parts(Scheme.FLOAT, 4, 2, 16, True, True), config)
    slots = torch.tensor([16, 36, 63])
    positions = replace(Positions(slots, torch.ones(3, 16), torch.ones(3, 16)), **changes)  # type: ignore[arg-type]
    step = Step(slots, positions, Decode((1, 2, 3), (17, 5, 16), TABLE), None, None)
    x = torch.ones(3, 48) if x is None else x
    return ops.gqa.decode(x, gqa, cache or _pages(ops), step)


def _mixed_cache(ops: NativeOps) -> LayerCache:
    """Keys of other sizes than values."""
    keys, values = _pages(ops, names=(KEY,)), _pages(ops, channels=64, names=(VALUE,))
    return LayerCache({**keys.pages, **values.pages}, BLOCK)


REFUSED = {
    "queries": (lambda ops: _attend(ops, q_lens=(1, 2, 4)), "grouped_attention_paged: q_lens"),
    "order": (lambda ops: _attend(ops, q_lens=(2, 1, 3)), "grouped_attention_paged: .* an index or a length"),
    "keys": (lambda ops: _attend(ops, kv_lens=(33, 5, 16)), "grouped_attention_paged: .* an index or a length"),
    "key lengths": (lambda ops: _attend(ops, kv_lens=(17, 5)), "grouped_attention_paged: kv_lens"),
    "block": (lambda ops: _attend(ops, block_table=TABLE + 1), "grouped_attention_paged: .* an index or a length"),
    "table": (lambda ops: _attend(ops, block_table=TABLE.long()), "grouped_attention_paged: block_table is int64"),
    "heads": (lambda ops: _attend(ops, heads=3), "grouped_attention_paged: .* sizes"),
    "channels": (lambda ops: _attend(ops, _pages(ops, channels=40)), "grouped_attention_paged: .* sizes"),
    "pools": (lambda ops: _attend(ops, _mixed_cache(ops)), "kv cache: key has 32 channels, value 64"),
    "cache dtype": (lambda ops: _attend(NativeOps(torch.bfloat16), _pages(ops)), "kv cache: key is torch.float32"),
    "ragged heads": (lambda ops: _ragged(ops, torch.ones(3, 3, 16)), "grouped_attention: .* sizes"),
    "ragged width": (lambda ops: _ragged(ops, torch.ones(3, 4, 8)), "grouped_attention: key is"),
    "ragged values": (lambda ops: _ragged(ops, value=torch.ones(5, 1, 16)), "grouped_attention: value is"),
    "ragged dtype": (
        lambda ops: _ragged(ops, value=torch.ones(5, 2, 16).half()),
        "grouped_attention: value is float16",
    ),
    "ragged keys": (lambda ops: _ragged(ops, kv_lens=(2, 6)), "kv_lens end at 6, and there are 5 keys"),
    "ragged order": (lambda ops: _ragged(ops, kv_lens=(6, 5)), "grouped_attention: .* an index or a length"),
    "ragged sequences": (lambda ops: _ragged(ops, kv_lens=(5,)), "grouped_attention: kv_lens"),
    "hidden": (lambda ops: _block(ops, torch.ones(3, 40)), "gqa_decode: x is"),
    "slot": (lambda ops: _block(ops, slots=torch.tensor([16, 36, 64])), "gqa_decode: .* an index or a length"),
    "slots": (lambda ops: _block(ops, slots=torch.tensor([16, 36])), "gqa_decode: cos is"),
    "angles": (lambda ops: _block(ops, sin=torch.ones(3, 8)), "gqa_decode: sin is"),
    "rotary width": (
        lambda ops: _block(ops, cos=torch.ones(3, 8), sin=torch.ones(3, 8)),
        "gqa_decode: cos has 8 channels, the layer rotates 16",
    ),
    "odd rotary width": (
        lambda ops: _block(ops, config=replace(CONFIG, rope_dim=15), cos=torch.ones(3, 15), sin=torch.ones(3, 15)),
        "gqa_decode: .* sizes",
    ),
    "block pools": (lambda ops: _block(ops, cache=_pages(ops, channels=64)), "gqa_decode: .* sizes"),
    "config": (lambda ops: _block(ops, config=replace(CONFIG, kv_heads=1)), "gqa: 128 outputs of q, k and v; .* 96"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_arguments_are_refused(all_ops: dict[torch.dtype, NativeOps], name: str) -> None:
    ops = all_ops[torch.float32]
    for run in (_attend, _ragged, _block):
        run(ops)
    wrong, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        wrong(ops)
