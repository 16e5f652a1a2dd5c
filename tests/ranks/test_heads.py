"""Attention of some heads gives the bits that they have among all heads: so ranks may divide them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_row_parallel import DTYPES, OPERATOR_SETS
from torch import Tensor

from npuq.runtime.attention.pools import LayerCache, Pool
from npuq.runtime.ops import Decode, Keys, Lengths, Ops, Queries
from npuq.runtime.ops.latent_attention import LATENT, ROPE
from npuq.runtime.ranks.group import ALONE

NOPE, D, V, L, BLOCK = 24, 16, 40, 48, 16
SCALE = 0.11
LENGTHS_OF_KEYS = (33, 7, 1)
LENGTHS_OF_QUERIES = (5, 1, 1)
HEADS = st.sampled_from([(1, 1), (2, 2), (1, 3), (5, 5, 5, 5), (4, 4), (3, 3, 3), (9, 7)])
TOKENS = sum(LENGTHS_OF_QUERIES)


def cumulative(lengths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(lengths[: place + 1]) for place in range(len(lengths)))


def cache_of(ops: Ops, draw: Callable[..., Tensor], int8: bool) -> LayerCache:
    pools = (Pool(LATENT, 64 if int8 else L, int8=True), Pool(ROPE, D))
    scales = {LATENT: torch.rand(64, generator=torch.Generator().manual_seed(3)) * 0.02 + 0.01} if int8 else {}
    cache = ops.caches.new(pools, 6, BLOCK, scales)
    for pool in pools:
        cache[pool.name].write(torch.arange(6 * BLOCK), draw(6 * BLOCK, pool.channels))
    return cache


def decode() -> Decode:
    table = torch.tensor([[0, 3, 5], [1, 0, 0], [4, 0, 0]], dtype=torch.int32)
    return Decode.selecting(cumulative(LENGTHS_OF_QUERIES), LENGTHS_OF_KEYS, table)


def same(whole: Tensor, parts: list[Tensor], dim: int = 1) -> None:
    assert torch.equal(whole, torch.cat(parts, dim))


def test_backends_say_what_their_last_bits_depend_on() -> None:
    """Ranks that differ in it would choose different experts."""
    said = {name: make(torch.float32, ALONE).arithmetic for name, make in OPERATOR_SETS.items()}
    assert said["reference"] == said["torch"] != said.get("native portable")
    assert len(set(said.values())) == len(said) - 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPERATOR_SETS)
@settings(max_examples=6)
@given(st.integers(0, 2**32 - 1), HEADS, st.booleans())
def test_heads_are_computed_apart(name: str, dtype: torch.dtype, seed: int, heads: tuple[int, ...], int8: bool) -> None:
    ops, generator, count = OPERATOR_SETS[name](dtype, ALONE), torch.Generator().manual_seed(seed), sum(heads)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    def split(x: Tensor, dim: int = 1) -> tuple[Tensor, ...]:
        return x.split(list(heads), dim)

    with torch.inference_mode():
        x, weight = draw(TOKENS, count, L), draw(count, L, V)
        parts = zip(split(x), split(weight, 0), strict=True)
        same(ops.products.batch_matmul(x, weight), [ops.products.batch_matmul(*part) for part in parts])

        keys = sum(LENGTHS_OF_KEYS)
        lengths = Lengths(cumulative(LENGTHS_OF_QUERIES), cumulative(LENGTHS_OF_KEYS), causal=True)
        nope, rope, shared = draw(TOKENS, count, NOPE), draw(TOKENS, count, D), draw(keys, D)
        k_nope, value = draw(keys, count, NOPE), draw(keys, count, V)

        def attend(nope: Tensor, rope: Tensor, k_nope: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return ops.mla.fused_infer_attention(Queries(nope, rope), Keys(k_nope, shared, value), lengths, SCALE)

        whole, lse = attend(nope, rope, k_nope, value)
        attended = [attend(*part) for part in zip(*map(split, (nope, rope, k_nope, value)), strict=True)]
        same(whole, [out for out, _ in attended])
        same(lse, [part for _, part in attended])
        merged = ops.mla.attention_update([whole, whole.flip(0)], [lse, lse.flip(0)])
        same(merged, [ops.mla.attention_update([out, out.flip(0)], [part, part.flip(0)]) for out, part in attended])

        cache, step = cache_of(ops, draw, int8), decode()
        q_latent = draw(TOKENS, count, cache[LATENT].pool.channels)
        paged = [
            ops.mla.fused_infer_attention_paged(q, r, cache, step, SCALE)
            for q, r in zip(split(q_latent), split(rope), strict=True)
        ]
        same(ops.mla.fused_infer_attention_paged(q_latent, rope, cache, step, SCALE), paged)
        if int8:
            return
        selected = torch.tensor([[0, 2, 3, -1]] * 5 + [[1, 6, -1, -1], [0, -1, -1, -1]], dtype=torch.int32)[:, None]
        some = [
            ops.sparse.sparse_flash_attention(q, r, cache, step, selected, SCALE)
            for q, r in zip(split(q_latent), split(rope), strict=True)
        ]
        same(ops.sparse.sparse_flash_attention(q_latent, rope, cache, step, selected, SCALE), some)
