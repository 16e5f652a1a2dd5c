"""Operators against numpy in float64, or against the documented rule written out; both CPU sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npuq.errors import ArtifactError, BackendError
from npuq.quant.int4 import pack_int4
from npuq.quant.schemes import Scheme
from npuq.runtime.backend import make_ops
from npuq.runtime.ops import Decode, Gating, LayerCache, LinearPart, Ops, PrefixSegment, Quantized
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.reference import ReferenceOps

# The last runs on native kernels where they are built.
SETS = {"reference": ReferenceOps, "torch": CpuOps, "cpu": lambda: make_ops("cpu")}
seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(params=SETS)
def ops(request: pytest.FixtureRequest) -> Ops:
    made: Ops = SETS[request.param]()
    return made


def random_part(rng: np.random.Generator, scheme: Scheme, outputs: int, inputs: int) -> tuple[LinearPart, np.ndarray]:
    """A random quantized linear and its codes, int64 `[N, K]`, extremes among them."""
    limit = 8 if scheme is Scheme.W4A8 else 128
    codes = rng.integers(-limit, limit, (outputs, inputs))
    codes[0] = -limit
    stored = torch.from_numpy(codes.astype(np.int8))
    scale = torch.from_numpy(rng.uniform(0.001, 0.1, (outputs, 1)).astype(np.float32))
    weight = pack_int4(stored) if scheme is Scheme.W4A8 else stored
    return LinearPart("some.linear", scheme, weight, scale), codes


# ---- quantizers ------------------------------------------------------------------------------------------------------


def test_dynamic_quant_rounds_half_to_even(ops: Ops) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    codes, scale = ops.dynamic_quant(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.tolist() == [1.0, 0.0]


def test_routing_quant_rounds_half_away_from_zero(ops: Ops) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    ids = torch.tensor([[1], [0]], dtype=torch.int32)
    rows, row_index, counts = ops.moe_init_routing(x, ids, 3, quantize=True)
    assert isinstance(rows, Quantized)
    assert rows.codes.tolist() == [[0] * 6, [127, 1, 2, 3, -1, -2]]
    assert rows.scale.tolist() == [0.0, 1.0]
    assert row_index.tolist() == [1, 0]
    assert counts.tolist() == [1, 1, 0]


@settings(max_examples=30)
@given(seeds)
def test_dynamic_quant_against_float64(seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((5, 33)).astype(np.float32)
    codes, scale = make_ops("cpu").dynamic_quant(torch.from_numpy(x))
    golden = x.astype(np.float64) * 127 / np.abs(x).max(1, keepdims=True)
    assert np.abs(codes.numpy() - golden).max() <= 0.5 + 1e-4
    np.testing.assert_allclose(scale.numpy(), np.abs(x).max(1) / 127, rtol=1e-6)


def test_dequant_swiglu_quant_activates_the_left_half(ops: Ops) -> None:
    x = np.random.default_rng(1).standard_normal((7, 24)).astype(np.float32) * 3
    left, right = x[:, :12].astype(np.float64), x[:, 12:].astype(np.float64)
    golden = left / (1 + np.exp(-left)) * right
    codes, scale = ops.dequant_swiglu_quant(torch.from_numpy(x))
    np.testing.assert_allclose(scale.numpy(), np.abs(golden).max(1) / 127, rtol=1e-5)
    assert np.abs(codes.numpy() - golden / scale.numpy()[:, None]).max() <= 0.5 + 1e-3
    np.testing.assert_allclose(ops.swiglu(torch.from_numpy(x)).numpy(), golden, atol=1e-5)


# ---- matmuls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [64, 1030, 2080])  # past the length that float32 sums exactly
def test_w8a8_linear_is_integer_exact(ops: Ops, inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    parts = [random_part(rng, Scheme.W8A8, outputs, inputs) for outputs in (6, 10)]
    codes = rng.integers(-127, 128, (3, inputs))
    codes[0] = -127
    scale = rng.uniform(0.001, 0.1, 3).astype(np.float32)
    x = Quantized(torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(scale))
    out = ops.linear(x, ops.w8a8_linear([part for part, _ in parts])).numpy()
    for (part, weight), got in zip(parts, np.split(out, [6], axis=1), strict=True):
        accumulator = (codes @ weight.T).astype(np.float32)
        assert part.scale is not None
        assert np.array_equal(got, accumulator * part.scale.numpy().T * scale[:, None])


def test_w4a8_grouped_matmul_is_integer_exact(ops: Ops) -> None:
    rng = np.random.default_rng(5)
    parts = [[random_part(rng, Scheme.W4A8, 8, 96) for _ in range(2)] for _ in range(4)]
    counts = [2, 0, 1, 3]
    codes = rng.integers(-127, 128, (6, 96))
    scale = rng.uniform(0.001, 0.1, 6).astype(np.float32)
    x = Quantized(torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(scale))
    handle = ops.experts_of([[part for part, _ in expert] for expert in parts])
    out = ops.grouped_matmul(x, handle, torch.tensor(counts)).numpy()
    for row, expert in enumerate(np.repeat(range(4), counts)):
        for side, (part, weight) in enumerate(parts[expert]):
            assert part.scale is not None
            accumulator = (codes[row] @ weight.T).astype(np.float32)
            expected = accumulator * part.scale.numpy()[:, 0] * scale[row]
            assert np.array_equal(out[row, 8 * side : 8 * side + 8], expected)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_float_linear_keeps_stored_weights(ops: Ops, stored: torch.dtype) -> None:
    weights = [torch.randn(5, 24).to(stored), torch.randn(3, 24).to(stored)]
    x = torch.randn(4, 24)
    golden = x.double() @ torch.cat(weights).double().T
    torch.testing.assert_close(ops.linear(x, ops.float_linear(weights)).double(), golden, rtol=1e-5, atol=1e-5)


def test_schemes_are_not_mixed(ops: Ops) -> None:
    rng = np.random.default_rng(0)
    eight, _ = random_part(rng, Scheme.W8A8, 4, 16)
    four, _ = random_part(rng, Scheme.W4A8, 4, 16)
    plain = LinearPart("plain", Scheme.FLOAT, torch.zeros(4, 16))
    with pytest.raises(ArtifactError, match=r"some\.linear \(W8A8_DYNAMIC\), plain \(FLOAT\)"):
        ops.linear_of([eight, plain])
    with pytest.raises(ArtifactError, match="W4A8_DYNAMIC"):
        ops.linear_of([four])
    with pytest.raises(ArtifactError, match="share one scheme"):
        ops.experts_of([[eight], [four]])


# ---- routing ---------------------------------------------------------------------------------------------------------


def golden_routing(logits: np.ndarray, bias: np.ndarray | None, gating: Gating) -> tuple[np.ndarray, np.ndarray]:
    """DeepSeek's router, one token at a time in float64."""
    all_weights, all_ids = [], []
    for row in logits.astype(np.float64):
        exp = np.exp(row - row.max())
        scores = 1 / (1 + np.exp(-row)) if gating.scoring == "sigmoid" else exp / exp.sum()
        choice = scores + (0 if bias is None else bias.astype(np.float64))
        groups = choice.reshape(gating.group_count, -1)
        if gating.group_count > 1:
            ordered = np.sort(groups, axis=1)
            best = ordered[:, -2:].sum(1) if gating.group_select_mode == 1 else ordered[:, -1]
            dropped = np.argsort(-best, kind="stable")[gating.k_group :]
            groups[dropped] = -np.inf
        ids = np.argsort(-groups.ravel(), kind="stable")[: gating.k]
        weights = scores[ids]
        if gating.renormalize:
            weights = weights / weights.sum()
        all_weights.append(weights * gating.scaling)
        all_ids.append(ids)
    return np.array(all_weights), np.array(all_ids)


GATINGS = {
    "v3": Gating(4, "sigmoid", 4, 2, 1, True, 2.5),
    "kimi-k2": Gating(4, "sigmoid", 1, 1, 1, True, 2.827),
    "v2": Gating(3, "softmax", 4, 2, 0, False, 16.0),
    "v2-lite": Gating(6, "softmax"),
}


@pytest.mark.parametrize("name", GATINGS)
@settings(max_examples=25)
@given(seed=seeds)
def test_gating_against_float64(name: str, seed: int) -> None:
    gating = GATINGS[name]
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((9, 16)).astype(np.float32)
    bias = rng.standard_normal(16).astype(np.float32) * 0.1 if gating.scoring == "sigmoid" else None
    weights, ids = make_ops("reference").moe_gating_top_k(
        torch.from_numpy(logits), None if bias is None else torch.from_numpy(bias), gating
    )
    golden_weights, golden_ids = golden_routing(logits, bias, gating)
    assert np.array_equal(ids.numpy(), golden_ids)
    assert ids.dtype == torch.int32
    np.testing.assert_allclose(weights.numpy(), golden_weights, rtol=1e-5)


def test_equal_scores_go_to_the_lower_expert(ops: Ops) -> None:
    _, ids = ops.moe_gating_top_k(torch.zeros(1, 8), None, Gating(3, "softmax", 4, 2))
    assert ids.tolist() == [[0, 1, 2]]


def test_bias_chooses_but_does_not_weigh(ops: Ops) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    weights, ids = ops.moe_gating_top_k(logits, bias, Gating(2, "sigmoid", renormalize=True))
    assert ids.tolist() == [[3, 0]]
    chosen = torch.sigmoid(torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(weights[0], chosen / chosen.sum())


@settings(max_examples=25)
@given(seed=seeds, name=st.sampled_from(sorted(SETS)))
def test_routing_round_trip(seed: int, name: str) -> None:
    """Every copy of a token goes to its expert's rows, and comes back weighted."""
    ops, rng = SETS[name](), np.random.default_rng(seed)
    tokens, k, experts, hidden = int(rng.integers(1, 9)), 3, 7, 5
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.uniform(size=(tokens, k)).astype(np.float32)
    rows, row_index, counts = ops.moe_init_routing(torch.from_numpy(x), torch.from_numpy(ids), experts, quantize=False)
    assert isinstance(rows, torch.Tensor)
    assert counts.tolist() == np.bincount(ids.ravel(), minlength=experts).tolist()
    of_row = np.repeat(np.arange(experts), counts.numpy())
    assert np.array_equal(of_row[row_index.numpy()].reshape(tokens, k), ids)
    factor = 1.0 + of_row[:, None]  # what expert e does: multiply by 1 + e
    skip = rng.standard_normal((tokens, hidden)).astype(np.float32)
    out = ops.moe_finalize_routing(
        rows * torch.from_numpy(factor).float(),
        torch.from_numpy(weights),
        row_index,
        torch.from_numpy(ids),
        torch.from_numpy(skip),
    )
    golden = skip + (weights.astype(np.float64) * (1 + ids)).sum(1, keepdims=True) * x
    np.testing.assert_allclose(out.numpy(), golden, rtol=1e-5, atol=1e-5)


# ---- rope, cache, attention ------------------------------------------------------------------------------------------


def complex_rope(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Neighbours as complex numbers, turned; then real parts before imaginary ones."""
    pairs = x.astype(np.float64)[..., 0::2] + 1j * x.astype(np.float64)[..., 1::2]
    turned = pairs * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def tables(angles: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    doubled = np.concatenate([angles, angles], axis=-1)
    return torch.from_numpy(np.cos(doubled)).float(), torch.from_numpy(np.sin(doubled)).float()


def test_interleave_rope_turns_pairs(ops: Ops) -> None:
    rng = np.random.default_rng(2)
    x, angles = rng.standard_normal((6, 3, 16)).astype(np.float32), rng.uniform(0, 6, (6, 8))
    out = ops.interleave_rope(torch.from_numpy(x), *tables(angles))
    np.testing.assert_allclose(out.numpy(), complex_rope(x, angles[:, None]), atol=1e-5)


def test_cache_bytes_and_outputs(ops: Ops) -> None:
    """kv_rmsnorm_rope_cache: which number lies at which place of both pools, and what it returns."""
    rng = np.random.default_rng(4)
    latent_size, rope_size, block_size = 32, 16, 16
    kv = rng.standard_normal((5, latent_size + rope_size)).astype(np.float32)
    gamma, angles = rng.uniform(0.5, 2, latent_size).astype(np.float32), rng.uniform(0, 6, (5, 8))
    (cache,) = ops.new_kv_cache(1, 3, block_size, latent_size, rope_size)
    slots = [40, 3, -1, 15, 16]
    written = ops.kv_rmsnorm_rope_cache(
        torch.from_numpy(kv),
        torch.from_numpy(gamma),
        *tables(angles),
        torch.tensor(slots),
        cache,
        1e-6,
        True,
    )
    latent = kv[:, :latent_size].astype(np.float64)
    latent = latent / np.sqrt((latent**2).mean(1, keepdims=True) + 1e-6) * gamma
    rope = complex_rope(kv[:, latent_size:], angles)
    assert written is not None
    np.testing.assert_allclose(written[0].numpy(), rope, atol=1e-5)
    np.testing.assert_allclose(written[1].numpy(), latent, atol=1e-5)
    for pool, rows in ((cache.latent, latent), (cache.rope, rope)):
        golden = np.zeros(tuple(pool.shape))
        for slot, row in zip(slots, rows, strict=True):
            for channel, value in enumerate(row):
                if slot >= 0:
                    golden[slot // block_size, channel // 16, slot % block_size, channel % 16] = value
        np.testing.assert_allclose(pool.numpy(), golden, atol=1e-5)
        assert np.count_nonzero(pool.numpy()) == 4 * rows.shape[1]


def golden_attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, scale: float, causal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """`[Q, N, A]`, `[S, N, A]`, `[S, N, V]` in float64."""
    scores = np.einsum("qna,sna->nqs", query.astype(np.float64), key.astype(np.float64)) * scale
    if causal:
        queries, keys = scores.shape[1:]
        scores[:, np.arange(keys)[None] > np.arange(queries)[:, None] + keys - queries] = -np.inf
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(scores).sum(-1, keepdims=True))
    probabilities = np.exp(scores - np.where(np.isinf(lse), 0, lse))
    return np.einsum("nqs,snv->qnv", probabilities, value.astype(np.float64)), lse.transpose(1, 0, 2)


@pytest.mark.parametrize("causal", [True, False])
def test_ragged_attention(ops: Ops, causal: bool) -> None:
    rng = np.random.default_rng(8)
    heads, nope, rope, width = 3, 8, 4, 6
    q_lens, kv_lens = [4, 5, 9], [4, 9, 11]  # the third sequence has more queries than keys

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    q_nope, q_rope = draw(9, heads, nope), draw(9, heads, rope)
    k_nope, k_rope, value = draw(11, heads, nope), draw(11, rope), draw(11, heads, width)
    tensors = [torch.from_numpy(array) for array in (q_nope, q_rope, k_nope, k_rope, value)]
    out, lse = ops.fused_infer_attention(*tensors, q_lens, kv_lens, 0.3, causal)
    query = np.concatenate([q_nope, q_rope], -1)
    key = np.concatenate([k_nope, np.broadcast_to(k_rope[:, None], (11, heads, rope))], -1)
    for q0, q1, k0, k1 in ((0, 4, 0, 4), (4, 5, 4, 9), (5, 9, 9, 11)):
        golden, golden_lse = golden_attention(query[q0:q1], key[k0:k1], value[k0:k1], 0.3, causal)
        np.testing.assert_allclose(out[q0:q1].numpy(), golden, atol=1e-5)
        np.testing.assert_allclose(lse[q0:q1].numpy(), golden_lse, atol=1e-5)


def test_merged_attention_equals_the_whole(ops: Ops) -> None:
    rng = np.random.default_rng(9)
    query, key, value = (rng.standard_normal((size, 2, 8)).astype(np.float32) for size in (5, 12, 12))
    parts = [golden_attention(query, key[part], value[part], 1.0, False) for part in (slice(0, 4), slice(4, 12))]
    merged = ops.attention_update(*([torch.from_numpy(part[i]).float() for part in parts] for i in range(2)))
    np.testing.assert_allclose(merged.numpy(), golden_attention(query, key, value, 1.0, False)[0], atol=1e-5)


def test_paged_attention_reads_only_its_blocks(ops: Ops) -> None:
    """Latents scattered over blocks, everything else NaN; several queries of a sequence are causal."""
    rng = np.random.default_rng(10)
    heads, latent_size, rope_size, block_size = 2, 32, 16, 16
    (cache,) = ops.new_kv_cache(1, 8, block_size, latent_size, rope_size)
    cache.latent.fill_(float("nan"))
    cache.rope.fill_(float("nan"))
    blocks, lengths, queries = [[6, 2], [5, 0, 3]], [20, 33], [1, 3]
    sequences = []
    for table, length in zip(blocks, lengths, strict=True):
        latent, rope = (rng.standard_normal((length, size)).astype(np.float32) for size in (latent_size, rope_size))
        for token in range(length):
            block, offset = table[token // block_size], token % block_size
            cache.latent[block, :, offset] = torch.from_numpy(latent[token]).view(-1, 16)
            cache.rope[block, :, offset] = torch.from_numpy(rope[token]).view(-1, 16)
        sequences.append((latent, rope))
    q_latent = rng.standard_normal((4, heads, latent_size)).astype(np.float32)
    q_rope = rng.standard_normal((4, heads, rope_size)).astype(np.float32)
    decode = Decode((1, 4), tuple(lengths), torch.tensor([[6, 2, 0], [5, 0, 3]], dtype=torch.int32))
    out = ops.fused_infer_attention_paged(torch.from_numpy(q_latent), torch.from_numpy(q_rope), cache, decode, 0.2)
    first = 0
    for (latent, rope), count in zip(sequences, queries, strict=True):
        rows = slice(first, first + count)
        query = np.concatenate([q_latent[rows], q_rope[rows]], -1)
        key = np.repeat(np.concatenate([latent, rope], -1)[:, None], heads, 1)
        golden, _ = golden_attention(query, key, np.repeat(latent[:, None], heads, 1), 0.2, True)
        np.testing.assert_allclose(out[rows].numpy(), golden, atol=1e-5)
        first += count
    segment = PrefixSegment(16, 17, torch.tensor([[0, 3]], dtype=torch.int32))
    gathered = ops.gather_pa_kv_cache(cache, segment)
    for tensor, whole in zip(gathered, sequences[1], strict=True):
        assert np.array_equal(tensor.numpy(), whole[16:33])


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_norms(ops: Ops) -> None:
    rng = np.random.default_rng(11)
    x, residual = (rng.standard_normal((4, 24)).astype(np.float32) for _ in range(2))
    gamma = rng.uniform(0.5, 2, 24).astype(np.float32)

    def golden(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64)
        return values / np.sqrt((values**2).mean(1, keepdims=True) + 1e-5) * gamma

    tensors = [torch.from_numpy(array) for array in (x, residual, gamma)]
    np.testing.assert_allclose(ops.rms_norm(tensors[0], tensors[2], 1e-5).numpy(), golden(x), atol=1e-5)
    normed, total = ops.add_rms_norm(*tensors, 1e-5)
    np.testing.assert_allclose(normed.numpy(), golden(x + residual), atol=1e-5)
    assert np.array_equal(total.numpy(), x + residual)


def test_bf16_norms_round_where_the_kernels_do() -> None:
    """rms_norm rounds once; add_rms_norm rounds the normalised sum before gamma multiplies it."""
    ops = make_ops("reference", torch.bfloat16)
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    gamma = torch.linspace(0.5, 1.7, 32).bfloat16()
    normal = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
    once, twice = (normal * gamma.float()).bfloat16(), (normal.bfloat16().float() * gamma.float()).bfloat16()
    assert not torch.equal(once, twice)
    assert torch.equal(ops.rms_norm(x, gamma, 1e-6), once)
    assert torch.equal(ops.add_rms_norm(x, torch.zeros_like(x), gamma, 1e-6)[0], twice)


# ---- backends --------------------------------------------------------------------------------------------------------


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="'tpu' is unknown"):
        make_ops("tpu")
    with pytest.raises(BackendError, match="npu:0"):
        make_ops("cpu", device="npu:0")
    with pytest.raises(BackendError, match="compute dtype"):
        make_ops("reference", torch.float64)


def test_cache_pools_are_zero_and_typed() -> None:
    pools = make_ops("cpu", torch.bfloat16).new_kv_cache(2, 3, 16, 64, 32)
    assert len(pools) == 2
    assert isinstance(pools[0], LayerCache)
    assert pools[0].latent.shape == (3, 4, 16, 16)
    assert pools[0].rope.shape == (3, 2, 16, 16)
    assert pools[0].latent.dtype == torch.bfloat16
    assert not pools[1].latent.any()
