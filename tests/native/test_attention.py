"""Attention over decompressed keys against float64: ragged sequences, odd sizes, views, and what becomes of NaN."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from npuq.runtime.ops import Keys, Lengths, Queries
from npuq.runtime.ops.native import NativeOps

from .cases import LEVELS, attention_tolerance

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")


@pytest.fixture(params=LEVELS, scope="module")
def ops(request: pytest.FixtureRequest) -> NativeOps:
    return NativeOps(threads=2, level=request.param)


def _attend(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """float64 (out, log-sum-exp) of one sequence: query [Q, N, A], key [S, N, A], value [S, N, V]."""
    scores = torch.einsum("qna,sna->nqs", query.double(), key.double()) * scale
    if causal:
        seen = torch.arange(len(key)) <= torch.arange(len(query))[:, None] + len(key) - len(query)
        scores = scores.masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # a row without keys is NaN there
    return torch.einsum("nqs,snv->qnv", weights, value.double()), scores.logsumexp(-1).T


@given(
    seed=st.integers(0, 2**31),
    lengths=st.lists(st.tuples(st.integers(1, 150), st.integers(0, 150)), min_size=1, max_size=3),
    heads=st.integers(1, 4),
    nope=st.integers(1, 40),
    rope=st.integers(1, 9),
    value=st.integers(1, 70),
    causal=st.booleans(),
)
def test_ragged_sequences(
    ops: NativeOps,
    seed: int,
    lengths: list[tuple[int, int]],
    heads: int,
    nope: int,
    rope: int,
    value: int,
    causal: bool,
) -> None:
    torch.manual_seed(seed)
    q_ends = torch.tensor([q for q, _ in lengths]).cumsum(0).tolist()
    kv_ends = torch.tensor([kv for _, kv in lengths]).cumsum(0).tolist()
    tokens, keys = q_ends[-1], kv_ends[-1]
    q_nope, q_rope = torch.randn(tokens, heads, nope + rope).split([nope, rope], dim=-1)
    k_nope, values = torch.randn(keys, heads, nope + value).split([nope, value], dim=-1)
    k_rope = torch.randn(keys, rope)
    queries, keys_and_values = Queries(q_nope, q_rope), Keys(k_nope, k_rope, values)
    out, lse = ops.mla.fused_infer_attention(queries, keys_and_values, Lengths(q_ends, kv_ends, causal), 0.3)
    query = torch.cat([q_nope, q_rope], -1)
    key = torch.cat([k_nope, k_rope[:, None].expand(-1, heads, -1)], -1)
    for (q0, q1), (k0, k1) in zip(pairwise([0, *q_ends]), pairwise([0, *kv_ends]), strict=True):
        expected, expected_lse = _attend(query[q0:q1], key[k0:k1], values[k0:k1], 0.3, causal)
        torch.testing.assert_close(out[q0:q1].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[q0:q1, :, 0].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_the_heads_of_glm_flash(ops: NativeOps) -> None:
    """20 heads of 192 + 64 channels and values of 256: a chunk of 33 tokens behind 40 others."""
    torch.manual_seed(0)
    q, k, v = torch.randn(33, 20, 256), torch.randn(73, 20, 192), torch.randn(73, 20, 256)
    k_rope = torch.randn(73, 64)
    queries, keys = Queries(q[..., :192], q[..., 192:]), Keys(k, k_rope, v)
    out, lse = ops.mla.fused_infer_attention(queries, keys, Lengths([33], [73], causal=True), 256**-0.5)
    key = torch.cat([k, k_rope.unsqueeze(1).expand(-1, 20, -1)], -1)
    expected, expected_lse = _attend(q, key, v, 256**-0.5, causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse[..., 0].double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("widths", [(32, 16, 32), (128, 64, 128), (16, 0, 80), (20, 6, 30)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_bfloat16(ops: NativeOps, widths: tuple[int, int, int], causal: bool) -> None:
    """Levels with products of bf16 use them where widths are multiples of 16."""
    ops = NativeOps(torch.bfloat16, threads=2, level=ops.pool.level)
    torch.manual_seed(0)
    nope, rope, width = widths
    lengths = [(200, 200), (1, 77), (17, 150), (3, 3)]
    q_ends = torch.tensor([q for q, _ in lengths]).cumsum(0).tolist()
    kv_ends = torch.tensor([kv for _, kv in lengths]).cumsum(0).tolist()
    q = torch.randn(q_ends[-1], 3, nope + rope).bfloat16()
    k, v = torch.randn(kv_ends[-1], 3, nope + width).bfloat16().split([nope, width], dim=-1)
    k_rope = torch.randn(kv_ends[-1], rope).bfloat16()
    queries, keys = Queries(q[..., :nope], q[..., nope:]), Keys(k, k_rope, v)
    out, lse = ops.mla.fused_infer_attention(queries, keys, Lengths(q_ends, kv_ends, causal=causal), 0.2)
    key = torch.cat([k, k_rope[:, None].expand(-1, 3, -1)], -1)
    for (q0, q1), (k0, k1) in zip(pairwise([0, *q_ends]), pairwise([0, *kv_ends]), strict=True):
        expected, expected_lse = _attend(q[q0:q1], key[k0:k1], v[k0:k1], 0.2, causal=causal)
        torch.testing.assert_close(
            out[q0:q1].double(), expected, **attention_tolerance(torch.bfloat16, v.float(), ops.pool.level)
        )
        torch.testing.assert_close(lse[q0:q1, :, 0].double(), expected_lse, rtol=1e-3, atol=2**-8)


@pytest.mark.parametrize("place", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_reaches_those_who_see_it_and_no_others(
    ops: NativeOps, place: str, poison: float, dtype: torch.dtype
) -> None:
    ops = NativeOps(dtype, threads=2, level=ops.pool.level)
    torch.manual_seed(0)
    tensors = {name: torch.randn(90, 2, 32 if name != "v" else 16).to(dtype) for name in ("q", "k", "v")}
    tensors[place][40, 1, 3] = poison

    def run() -> Tensor:
        q, k, v = tensors.values()
        queries, keys = Queries(q[..., :16], q[..., 16:]), Keys(k[..., :16], k[:, 0, 16:], v)
        out, _ = ops.mla.fused_infer_attention(queries, keys, Lengths([90], [90], causal=True), 0.3)
        return out

    out = run()
    finite = out.isfinite().all(-1)
    assert finite[:, 0].all()
    assert finite[:40, 1].all()
    assert finite[41:, 1].all() if place == "q" else not finite[40:, 1].any()
    assert not finite[40, 1]
    tensors[place][40, 1, 3] = 0.5
    tolerance = attention_tolerance(dtype, torch.ones(1), ops.pool.level)
    torch.testing.assert_close(out[finite], run()[finite], **tolerance)
