"""Composites in one call give, bit for bit, what the same kernels give called one by one."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import (
    Decode,
    Gating,
    LatentAttention,
    LinearPart,
    MlaConfig,
    MlaParts,
    MlpWeights,
    MoeWeights,
    Positions,
    Routing,
    Step,
)
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.ops.native.blocks import NativeMla
from npuq.runtime.ranks.group import Alone

from .cases import LEVELS, part

pytestmark = pytest.mark.skipif(not LEVELS, reason="the native library is not built here (no C compiler)")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=LEVELS, scope="module")
def all_ops(request: pytest.FixtureRequest) -> dict[torch.dtype, NativeOps]:
    return {dtype: NativeOps(dtype, threads=2, level=request.param) for dtype in DTYPES}


def _part(generator: np.random.Generator, scheme: Scheme, rows: int, columns: int) -> LinearPart:
    if scheme is not Scheme.FLOAT:
        return part(generator, scheme, rows, columns, int(generator.integers(4)))
    weight = torch.from_numpy(generator.standard_normal((rows, columns), dtype=np.float32)).bfloat16()
    return LinearPart("float", scheme, weight)


def _moe(
    ops: NativeOps, generator: np.random.Generator, scheme: Scheme, experts: int, hidden: int, width: int
) -> MoeWeights:
    gate_up = [[_part(generator, scheme, width, hidden) for _ in range(2)] for _ in range(experts)]
    down = [[_part(generator, scheme, hidden, width)] for _ in range(experts)]
    router = torch.from_numpy(generator.standard_normal((experts, hidden), dtype=np.float32))
    gating = Gating(min(3, experts), "sigmoid", renormalize=True, scaling=2.5)
    return MoeWeights(
        ops.weights.router(router),
        torch.from_numpy(generator.standard_normal(experts, dtype=np.float32)),
        gating,
        ops.weights.experts_of(gate_up),
        ops.weights.experts_of(down),
        experts,
        scheme is not Scheme.FLOAT,
    )


def _rows(generator: np.random.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).to(dtype)


def _same(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W8A8])
@given(seed=st.integers(0, 2**31), rows=st.integers(0, 20), hidden=st.integers(1, 90), width=st.integers(1, 70))
def test_mlp(
    all_ops: dict[torch.dtype, NativeOps],
    dtype: torch.dtype,
    scheme: Scheme,
    seed: int,
    rows: int,
    hidden: int,
    width: int,
) -> None:
    ops, generator = all_ops[dtype], np.random.default_rng(seed)
    gate_up = ops.weights.linear_of([_part(generator, scheme, width, hidden) for _ in range(2)])
    down = ops.weights.linear_of([_part(generator, scheme, hidden, width)])
    weights = MlpWeights(gate_up, down, scheme is not Scheme.FLOAT)
    x = _rows(generator, dtype, rows, hidden)
    _same(ops.routing.mlp(x, weights), Routing.mlp(ops.routing, x, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W8A8, Scheme.W4A8])
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 12),
    experts=st.integers(1, 7),
    pairs=st.integers(1, 20),
    width=st.integers(1, 20),
    with_shared=st.booleans(),
    poisoned=st.booleans(),
)
def test_moe(
    all_ops: dict[torch.dtype, NativeOps],
    dtype: torch.dtype,
    scheme: Scheme,
    seed: int,
    tokens: int,
    experts: int,
    pairs: int,
    width: int,
    with_shared: bool,
    poisoned: bool,
) -> None:
    ops, generator = all_ops[dtype], np.random.default_rng(seed)
    weights = _moe(ops, generator, scheme, experts, 2 * pairs, 2 * width)
    x = _rows(generator, dtype, tokens, 2 * pairs)
    shared = _rows(generator, dtype, tokens, 2 * pairs) if with_shared else None
    top_weights, ids = ops.routing.moe_gate(x, weights)
    expected_weights, expected_ids = Routing.moe_gate(ops.routing, x, weights)
    _same(top_weights, expected_weights)
    _same(ids, expected_ids)
    if poisoned and tokens:
        x[0, 0] = torch.nan
    out = ops.routing.moe_experts(x, top_weights, ids, weights, shared)
    _same(out, Routing.moe_experts(ops.routing, x, top_weights, ids, weights, shared))
    mlp = None
    if with_shared:
        gate_up = ops.weights.linear_of([_part(generator, Scheme.W8A8, 9, 2 * pairs) for _ in range(2)])
        mlp = MlpWeights(gate_up, ops.weights.linear_of([_part(generator, Scheme.W8A8, 2 * pairs, 9)]), quantized=True)
    weights = dataclasses.replace(weights, shared=mlp)
    _same(ops.routing.moe(x, ops.routing.moe_of(weights)), Routing.moe(ops.routing, x, weights))
    if poisoned and tokens:
        assert out[0].isnan().all()
        assert out[1:].isfinite().all()


class _Rank(Alone):
    """One rank of several, whose others are computed one after the other."""

    def __init__(self, rank: int):
        self.rank = rank


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W4A8, Scheme.W8A8])
@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(0, 12),
    ranks=st.integers(1, 3),
    each=st.integers(1, 3),
    chosen=st.integers(1, 9),
)
def test_experts_divided_among_ranks(
    all_ops: dict[torch.dtype, NativeOps],
    dtype: torch.dtype,
    scheme: Scheme,
    seed: int,
    tokens: int,
    ranks: int,
    each: int,
    chosen: int,
) -> None:
    """The rows of all ranks are those of one process; those of few chosen experts leave ranks without any."""
    ops, generator, experts = all_ops[dtype], np.random.default_rng(seed), ranks * each
    parts = [[_part(generator, scheme, 12, 16) for _ in range(2)] for _ in range(experts)]
    downs = [[_part(generator, scheme, 16, 12)] for _ in range(experts)]
    weights = _moe(ops, generator, scheme, experts, 16, 12)
    weights = dataclasses.replace(weights, gate_up=ops.weights.experts_of(parts), down=ops.weights.experts_of(downs))
    x = _rows(generator, dtype, tokens, 16)
    ids = torch.from_numpy(generator.integers(0, min(chosen, experts), (tokens, 2)).astype(np.int32))
    rows, row_index, group_list = Routing.own_rows(ops.routing, x, ids, weights) if tokens else (x, ids.flatten(), None)
    found = []
    for rank in range(ranks):
        routing = copy.copy(ops.routing)
        routing.group = _Rank(rank)
        mine = slice(rank * each, (rank + 1) * each)
        own = dataclasses.replace(
            weights,
            gate_up=ops.weights.experts_of(parts[mine]),
            down=ops.weights.experts_of(downs[mine]),
            ranks=ranks,
        )
        some, index, counts = routing.own_rows(x, ids, own)
        _same(index, row_index)
        assert group_list is None or torch.equal(counts, group_list)
        _same(some, Routing.own_rows(routing, x, ids, own)[0])
        found.append(some)
    _same(torch.cat(found), rows)


@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W4A8])
def test_more_rows_than_the_middle_holds(scheme: Scheme) -> None:
    """Experts in several turns, and one expert with more rows than a turn has."""
    ops, generator = NativeOps(threads=2), np.random.default_rng(0)
    weights = _moe(ops, generator, scheme, 5, 8, 8200)  # 12 MB hold 191 rows of 16400 floats
    x = _rows(generator, torch.float32, 400, 8)
    ids = torch.from_numpy(generator.choice([0, 1, 3, 3, 3, 3], (400, 1)).astype(np.int32))
    top_weights = torch.ones(400, 1)
    _same(
        ops.routing.moe_experts(x, top_weights, ids, weights, None),
        Routing.moe_experts(ops.routing, x, top_weights, ids, weights, None),
    )
    mlp = MlpWeights(
        ops.weights.linear_of([_part(generator, Scheme.W8A8, 8200, 8) for _ in range(2)]),
        ops.weights.linear_of([_part(generator, Scheme.W8A8, 8, 8200)]),
        quantized=True,
    )
    _same(ops.routing.mlp(x, mlp), Routing.mlp(ops.routing, x, mlp))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("q_lora", [None, 40])
@pytest.mark.parametrize("scheme", [Scheme.FLOAT, Scheme.W8A8])
@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("int8_cache", [False, True])
def test_mla_before_attention_and_all_of_it(
    all_ops: dict[torch.dtype, NativeOps],
    dtype: torch.dtype,
    q_lora: int | None,
    scheme: Scheme,
    tokens: int,
    int8_cache: bool,
) -> None:
    config = MlaConfig(3, q_lora, 32, 24, 16, 20, 1e-6, 0.1)
    _check_mla(all_ops[dtype], 50, config, scheme, tokens, int8_cache)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8_cache", [False, True])
def test_the_attention_of_glm_flash(
    all_ops: dict[torch.dtype, NativeOps], dtype: torch.dtype, int8_cache: bool
) -> None:
    """20 heads of 192 + 64 channels with values of 256, in the widths that are published."""
    config = MlaConfig(20, 768, 512, 192, 64, 256, 1e-5, 256**-0.5)
    _check_mla(all_ops[dtype], 2048, config, Scheme.W8A8, 3, int8_cache)


def _check_mla(ops: NativeOps, hidden: int, config: MlaConfig, scheme: Scheme, tokens: int, int8_cache: bool) -> None:
    """Compare the fused steps with the same steps one by one, in torch."""
    generator, dtype = np.random.default_rng(tokens), ops.mla.dtype
    heads, q_lora, latent = config.heads, config.q_lora_rank, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    parts = MlaParts(
        q=None if q_lora else _part(generator, scheme, heads * (nope + rope), hidden),
        q_a=_part(generator, scheme, q_lora, hidden) if q_lora else None,
        q_a_norm=_rows(generator, torch.bfloat16, q_lora) if q_lora else None,
        q_b=_part(generator, scheme, heads * (nope + rope), q_lora) if q_lora else None,
        kv_a=_part(generator, scheme, latent + rope, hidden),
        kv_a_norm=_rows(generator, torch.bfloat16, latent),
        kv_b=_rows(generator, torch.bfloat16, heads * (nope + value), latent),
        o=_part(generator, scheme, hidden, heads * value),
    )
    mla = ops.mla.load(parts, config)
    assert isinstance(mla, NativeMla)
    step = Step(
        token_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=Positions(
            slots=torch.tensor([17, 3, -1, 0, 31][:tokens]),
            cos=_rows(generator, dtype, tokens, rope),
            sin=_rows(generator, dtype, tokens, rope),
        ),
        decode=Decode((tokens,), (20,), torch.tensor([[1, 0]], dtype=torch.int32)),
        prefill=None,
        output_rows=None,
    )
    scales = {"latent": torch.linspace(0.01, 0.05, latent)} if int8_cache else {}
    pools = Pool("latent", latent, int8=True), Pool("rope", rope)
    caches = [ops.caches.new(pools, 2, 16, scales) for _ in range(2)]
    x = _rows(generator, dtype, tokens, hidden)
    got, expected = (
        ops.mla.prolog(x, mla, caches[0], step),
        LatentAttention.prolog(ops.mla, x, mla, caches[1], step),
    )
    for left, right in zip(got, expected, strict=True):
        _same(left, right)
    assert caches[0]["latent"].tensor.any()
    _same(caches[0]["latent"].tensor, caches[1]["latent"].tensor)
    _same(caches[0]["rope"].tensor, caches[1]["rope"].tensor)
    for cache in caches:
        # Keys that the step has not written.
        cache["latent"].tensor[0], cache["rope"].tensor[0] = 50 if int8_cache else 0.5, -0.5
    out = ops.mla.decode(x, mla, caches[0], step)
    _same(out, LatentAttention.decode(ops.mla, x, mla, caches[1], step))
    assert out.any()
