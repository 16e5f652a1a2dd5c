"""Absorbed attention over long contexts: spans of keys against float64, and the same bits however a call is divided."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import Decode, LayerCache
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.reference import ReferenceOps

from .cases import LEVELS, attention_tolerance

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

LATENT, ROPE, HEADS, BLOCK, SCALE = 64, 32, 20, 16, 0.1
# Queries and keys of each sequence: one span, several, and as many as there are at most.
LENGTHS = ((1, 1100), (3, 40), (1, 256), (2, 5000))


@pytest.fixture(params=LEVELS, scope="module")
def level(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _decode(lengths: tuple[tuple[int, int], ...] = LENGTHS) -> Decode:
    generator = np.random.default_rng(5)
    needed = [-(-keys // BLOCK) for _, keys in lengths]
    blocks = generator.permutation(sum(needed)).tolist()
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    for row, count in zip(table, needed, strict=True):
        row[:count] = torch.tensor([blocks.pop() for _ in range(count)], dtype=torch.int32)
    ends = tuple(np.cumsum([queries for queries, _ in lengths]).tolist())
    return Decode(ends, tuple(keys for _, keys in lengths), table)


def _scales() -> Tensor:
    return torch.rand(LATENT, generator=torch.Generator().manual_seed(2)) * 0.02 + 0.01


def _cache(ops: NativeOps, decode: Decode, int8: bool) -> LayerCache:
    generator = torch.Generator().manual_seed(3)
    scales = {"latent": _scales()} if int8 else {}
    blocks = int(decode.block_table.max()) + 1
    cache = ops.caches.new((Pool("latent", LATENT, int8=True), Pool("rope", ROPE)), blocks, BLOCK, scales)
    if int8:
        cache["latent"].tensor.random_(-127, 128, generator=generator)
    else:
        cache["latent"].tensor.normal_(generator=generator)
    cache["rope"].tensor.normal_(generator=generator)
    return cache


def _queries(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = sum(queries for queries, _ in LENGTHS)
    latent, rope = (torch.randn(tokens, HEADS, width, generator=generator).to(dtype) for width in (LATENT, ROPE))
    return latent, rope


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_spans(level: str, dtype: torch.dtype, int8: bool) -> None:
    # The step's 7 tokens are tasks of their own for one thread; for four, spans are.
    one, four = (NativeOps(dtype, threads=threads, level=level) for threads in (1, 4))
    decode, (q_latent, q_rope) = _decode(), _queries(dtype)
    cache = _cache(one, decode, int8)
    out = one.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, SCALE)
    assert torch.equal(out, four.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, SCALE))
    some = slice(4, 13)
    part = one.mla.fused_infer_attention_paged(
        q_latent[:, some].contiguous(), q_rope[:, some].contiguous(), cache, decode, SCALE
    )
    assert torch.equal(part, out[:, some])
    last = replace(
        decode,
        q_lens=(LENGTHS[-1][0],),
        kv_lens=decode.kv_lens[-1:],
        block_table=decode.block_table[-1:].contiguous(),
    )
    alone = one.mla.fused_infer_attention_paged(q_latent[-2:], q_rope[-2:], cache, last, SCALE)
    assert torch.equal(alone, out[-2:])
    first = 0
    for (queries, keys), blocks in zip(LENGTHS, decode.block_table, strict=True):
        values = cache["latent"].read(blocks, keys).double() * (_scales().double() if int8 else 1)
        rope = cache["rope"].read(blocks, keys).double()
        for query in range(queries):
            seen, token = keys - queries + query + 1, first + query
            scores = q_latent[token].double() @ values[:seen].T + q_rope[token].double() @ rope[:seen].T
            expected = (scores * SCALE).softmax(-1) @ values[:seen]
            tolerance = attention_tolerance(dtype, values, level)
            if int8:  # queries are rounded to 1 / 127 of their largest channel
                tolerance = {"rtol": 2**-6, "atol": 0.02 * float(values.abs().max())}
            torch.testing.assert_close(out[token].double(), expected, **tolerance)
        first += queries


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("heads", [3, 4])
def test_tokens_that_share_a_task_keep_their_bits(level: str, dtype: torch.dtype, int8: bool, heads: int) -> None:
    """Each as if alone: over ends in the last tile, into a next span, where spans grow, and before the first key."""
    one, four = (NativeOps(dtype, threads=threads, level=level) for threads in (1, 4))
    decode = _decode(((7, 5), (12, 262), (1, 40), (9, 4100)))
    cache, generator = _cache(one, decode, int8), torch.Generator().manual_seed(7)
    shape = (decode.q_lens[-1], heads)
    q_latent, q_rope = (torch.randn(*shape, width, generator=generator).to(dtype) for width in (LATENT, ROPE))
    out = one.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, SCALE)
    assert torch.equal(out, four.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, SCALE))
    first = 0
    for end, keys, blocks in zip(decode.q_lens, decode.kv_lens, decode.block_table, strict=True):
        for token in range(first, end):
            seen = max(keys - (end - 1 - token), 0)
            query = slice(token, token + 1)
            single = Decode((1,), (seen,), blocks[None].contiguous())
            alone = one.mla.fused_infer_attention_paged(q_latent[query], q_rope[query], cache, single, SCALE)
            assert torch.equal(alone, out[query]), token
        first = end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_score_that_is_no_number_stays_one(level: str, dtype: torch.dtype) -> None:
    """In whichever span it is; sequences that do not see it stay as they are."""
    ops, decode, (q_latent, q_rope) = NativeOps(dtype, threads=4, level=level), _decode(), _queries(dtype)
    cache = _cache(ops, decode, int8=False)
    for position in (3, 700):
        slot = int(decode.block_table[0, position // BLOCK]) * BLOCK + position % BLOCK
        before = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, SCALE)
        row = cache["rope"].read(decode.block_table[0], position + 1)[-1:].clone()
        cache["rope"].write(torch.tensor([slot]), torch.full_like(row, torch.nan))
        out = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, SCALE)
        assert out[0].isnan().all()
        assert torch.equal(out[1:], before[1:])
        cache["rope"].write(torch.tensor([slot]), row)


def test_codes_cost_no_more_than_their_weights_rounding(level: str) -> None:
    """Beside the reference, which rounds queries alike: weights in units of a 255th, and outputs in bf16."""
    ops, reference, decode = NativeOps(torch.bfloat16, threads=1, level=level), ReferenceOps(torch.bfloat16), _decode()
    cache, queries = _cache(ops, decode, int8=True), _queries(torch.bfloat16)
    for scale in (0.003, 0.02):  # scores with standard deviations of about 0.3 and 2
        out = ops.mla.fused_infer_attention_paged(*queries, cache, decode, scale).double()
        expected = reference.mla.fused_infer_attention_paged(*queries, cache, decode, scale).double()
        assert float((out - expected).pow(2).mean() / expected.pow(2).mean()) < 0.01**2


def test_a_wide_latent_of_codes_fits_its_memory(level: str) -> None:
    """512 channels, as released models have them: the codes of a query are longer than its rotary part in float32. The
    build under sanitizers sees a byte too many."""
    ops, (heads, latent, rope, keys) = NativeOps(torch.float32, threads=1, level=level), (8, 512, 16, 5)
    generator = torch.Generator().manual_seed(6)
    scales = torch.rand(latent, generator=generator) * 0.02 + 0.01
    cache = ops.caches.new((Pool("latent", latent, int8=True), Pool("rope", rope)), 1, BLOCK, {"latent": scales})
    cache["latent"].tensor.random_(-127, 128, generator=generator)
    cache["rope"].tensor.normal_(generator=generator)
    q_latent, q_rope = (torch.randn(1, heads, width, generator=generator) for width in (latent, rope))
    decode = Decode((1,), (keys,), torch.zeros(1, 1, dtype=torch.int32))
    out = ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, SCALE)
    values = cache["latent"].read(decode.block_table[0], keys) * scales
    scores = q_latent[0] @ values.T + q_rope[0] @ cache["rope"].read(decode.block_table[0], keys).T
    torch.testing.assert_close(out[0], (scores * SCALE).softmax(-1) @ values, rtol=2**-6, atol=0.05)
