"""The rig's own semantics against numpy, element by element from the documented formulas: the emulation is no oracle
unless something else says the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ascend_rig import emulate
from ascend_rig.formats import FRACTAL_NZ, ND, format_of, to_nd, to_nz, unpack_int4

from npuq.runtime.ops.ascend.weights import cast_nz

npu = torch.ops.npu
SLOTS_PER_PAGE = 16


@pytest.fixture(autouse=True)
def _wide():
    with emulate.use_rules(wide=True):
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def test_nz_places_every_element_where_the_formula_says():
    k, n, d0 = 48, 96, 32
    matrix = torch.arange(k * n, dtype=torch.int32).remainder(251).sub(125).to(torch.int8).view(k, n)
    stored = to_nz(matrix).flatten()
    for row, column in [(0, 0), (1, 0), (0, 1), (17, 33), (47, 95), (16, 31), (15, 32)]:
        flat = ((column // d0 * (k // 16) + row // 16) * 16 + row % 16) * d0 + column % d0
        assert stored[flat] == matrix[row, column]
    assert format_of(to_nz(matrix)) == FRACTAL_NZ
    assert torch.equal(to_nd(to_nz(matrix)), matrix)


def test_int4_cast_as_bytes_then_viewed_as_int32_is_nz_of_int4():
    codes = torch.randint(-8, 8, (2, 32, 128), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    packed = (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)
    handle = npu.npu_format_cast(packed.contiguous(), FRACTAL_NZ).view(torch.int32)
    assert handle.shape == (2, 32, 16) and format_of(handle) == FRACTAL_NZ
    assert torch.equal(unpack_int4(to_nd(handle)), codes)


def test_a_copy_of_an_nz_tensor_is_nd_and_a_partial_view_is_refused():
    stored = to_nz(torch.zeros(32, 64, dtype=torch.int8))
    assert format_of(stored.clone()) != FRACTAL_NZ
    with pytest.raises(emulate.RefusedError, match="loses its format"):
        to_nd(stored[16:])


def test_a_matrix_that_does_not_fill_its_tiles_is_refused():
    with pytest.raises(emulate.RefusedError, match="does not fill tiles"):
        npu.npu_format_cast(torch.zeros(24, 32, dtype=torch.int8), FRACTAL_NZ)


def test_the_runtime_casts_what_tiles_and_keeps_the_rest():
    for shape, expected in [((128, 384), FRACTAL_NZ), ((128, 400), ND), ((200, 128), ND), ((3, 64, 96), FRACTAL_NZ)]:
        assert format_of(cast_nz(torch.zeros(shape, dtype=torch.int8))) == expected
    assert format_of(cast_nz(torch.zeros(32, 16, dtype=torch.bfloat16))) == FRACTAL_NZ
    assert format_of(cast_nz(torch.zeros(32, 24, dtype=torch.bfloat16))) == ND


def test_dynamic_quant_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    codes, scale = npu.npu_dynamic_quant(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.tolist() == [1.0, 0.0]


def test_init_routing_sorts_the_rows_of_a_range_of_experts():
    tokens, k, experts, (first, last) = 6, 3, 10, (4, 7)
    generator = np.random.default_rng(3)
    ids = np.stack([generator.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    x = normal(tokens, 64)
    rows, index, counts, scale = npu.npu_moe_init_routing_v2(
        x,
        torch.from_numpy(ids),
        active_num=tokens * k,
        expert_num=experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=[first, last],
    )
    flat = [(int(expert), place) for place, expert in enumerate(ids.flatten()) if first <= expert < last]
    order = [place for _, place in sorted(flat)]
    assert torch.equal(rows[: len(order)], x[[place // k for place in order]]) and rows[len(order) :].isnan().all()
    assert index.tolist() == [order.index(place) if place in order else -1 for place in range(tokens * k)]
    assert counts.tolist() == [int((ids == expert).sum()) for expert in range(first, last)]
    assert scale.isnan().all()


def test_init_routing_rounds_half_away_from_zero():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    arguments = {"expert_num": 4, "quant_mode": 1, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    codes, *_ = npu.npu_moe_init_routing_v2(x, torch.tensor([[2]], dtype=torch.int32), **arguments)
    assert codes.tolist() == [[127, 1, 2, 3, -1, -2]]


def test_dynamic_quant_of_smoothed_rows():
    x, smooth = normal(5, 64), normal(64, seed=1).abs() + 0.1
    codes, scale = npu.npu_dynamic_quant(x, smooth_scales=smooth)
    values = x.numpy() * smooth.numpy()
    np.testing.assert_allclose(scale, np.abs(values).max(1) / 127, rtol=1e-6)
    np.testing.assert_array_equal(codes, np.rint(values * (np.float32(127) / np.abs(values).max(1, keepdims=True))))


def test_quantize_divides_by_default_and_saturates():
    x = torch.tensor([[1.0, 1.5, 2.5, -1e4, 1e4, 0.3]])
    scales = torch.tensor([2.0, 1.0, 1.0, 0.5, 0.5, 0.1])
    assert npu.npu_quantize(x, scales, None, torch.qint8, -1).tolist() == [[0, 2, 2, -128, 127, 3]]


def test_dequant_swiglu_quant_activates_the_left_half_only_when_told():
    x = normal(3, 64)
    left, right = np.split(x.double().numpy(), 2, axis=1)
    for told, expected in ((True, silu(left) * right), (False, silu(right) * left)):
        codes, scale = npu.npu_dequant_swiglu_quant(x, activate_left=told, quant_mode=1)
        largest = np.abs(expected).max(axis=1)
        np.testing.assert_allclose(scale.numpy(), largest / 127, rtol=1e-5)
        np.testing.assert_array_equal(codes.numpy(), np.rint(expected / (largest / 127)[:, None]))


def test_norms():
    x, y, gamma = normal(3, 32), normal(3, 32, seed=1), normal(32, seed=2)

    def rms(values):
        return values / np.sqrt((values**2).mean(axis=1, keepdims=True) + 1e-6) * gamma.double().numpy()

    np.testing.assert_allclose(npu.npu_rms_norm(x, gamma)[0], rms(x.double().numpy()), rtol=1e-5)
    total = x.double().numpy() + y.double().numpy()
    normed, _, summed = npu.npu_add_rms_norm(x, y, gamma)
    np.testing.assert_allclose(normed, rms(total), rtol=1e-5)
    np.testing.assert_allclose(summed, total, rtol=1e-6)
    codes, _, summed, scale, _ = npu.npu_add_rms_norm_dynamic_quant(x, y, gamma)
    np.testing.assert_allclose(codes.numpy() * scale.numpy()[:, None], rms(total), atol=float(scale.max()) / 2 * 1.001)
    np.testing.assert_allclose(summed, total, rtol=1e-6)


def test_bf16_add_rms_norm_rounds_before_gamma():
    x, y, gamma = normal(4, 64).bfloat16(), normal(4, 64, seed=1).bfloat16(), normal(64, seed=2).bfloat16()
    total = x.float() + y.float()
    once = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + 1e-6)
    normed, _, _ = npu.npu_add_rms_norm(x, y, gamma)
    assert torch.equal(normed, (once.bfloat16().float() * gamma.float()).bfloat16())
    assert not torch.equal(normed, (once * gamma.float()).bfloat16())


def experts_case():
    generator = torch.Generator().manual_seed(3)
    e, k, n, counts = 3, 64, 64, [2, 0, 3]
    codes = torch.randint(-8, 8, (e, k, n), generator=generator, dtype=torch.int8)
    packed = ((codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)).contiguous().view(torch.int32)
    scale = torch.rand(e, n, generator=generator) + 0.1
    x = torch.randint(-128, 128, (7, k), generator=generator, dtype=torch.int8)
    tokens = torch.rand(7, generator=generator)
    return codes, packed, scale, x, tokens, counts


def grouped(x, packed, scale, bias, tokens, counts):
    words = (scale.view(torch.int32).long() & 0xFFFFFFFF).unsqueeze(1)
    return npu.npu_grouped_matmul(
        [x.clone()], [packed], bias=[bias], scale=[words], per_token_scale=[tokens], split_item=2, group_type=0,
        group_list=torch.tensor(counts), group_list_type=1, output_dtype=torch.float32,
    )[0]  # fmt: skip


def test_w4a8_by_nibbles_equals_the_integer_product_with_a_right_bias_only():
    codes, packed, scale, x, tokens, counts = experts_case()
    bias = 8 * codes.sum(1) * scale
    out = grouped(x, packed, scale, bias, tokens, counts)
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        integers = x[rows].numpy().astype(np.int64) @ codes[expert].numpy().astype(np.int64)
        expected = integers * scale[expert].double().numpy() * tokens[rows].double().numpy()[:, None]
        np.testing.assert_allclose(out[rows], expected, rtol=1e-4, atol=1e-2)
        start += count
    assert out[start:].isnan().all(), "rows past the groups are never written"
    wrong = grouped(x, packed, scale, bias.roll(1, 0), tokens, counts)
    assert (wrong[:start] - out[:start]).abs().max() > 1


def test_w4a8_overwrites_its_rows():
    codes, packed, scale, x, tokens, counts = experts_case()
    rows = x.clone()
    words = (scale.view(torch.int32).long() & 0xFFFFFFFF).unsqueeze(1)
    npu.npu_grouped_matmul(
        [rows], [packed], bias=[8 * codes.sum(1) * scale], scale=[words], per_token_scale=[tokens], split_item=2,
        group_type=0, group_list=torch.tensor(counts), group_list_type=1, output_dtype=torch.float32,
    )  # fmt: skip
    assert not torch.equal(rows, x)


def test_gating_follows_the_published_router():
    """DeepSeek-V3's rule, in plain loops: groups by their two best biased scores, weights from the unbiased ones."""
    logits, bias = normal(6, 16), 0.2 * normal(16, seed=1)
    weights, ids, _ = npu.npu_moe_gating_top_k(
        logits, 3, bias=bias, k_group=2, group_count=4, group_select_mode=1, norm_type=1, routed_scaling_factor=2.5
    )
    for token in range(6):
        score = 1 / (1 + np.exp(-logits[token].double().numpy()))
        biased = score + bias.double().numpy()
        group_scores = [np.sort(biased[g * 4 : g * 4 + 4])[-2:].sum() for g in range(4)]
        kept = sorted(range(4), key=lambda g: -group_scores[g])[:2]
        allowed = [expert for expert in range(16) if expert // 4 in kept]
        best = sorted(allowed, key=lambda expert: -biased[expert])[:3]
        assert ids[token].tolist() == best
        np.testing.assert_allclose(weights[token], score[best] / score[best].sum() * 2.5, rtol=1e-5)


def test_softmax_gatings():
    logits = normal(5, 8)
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1)[:, :3]
    chosen = np.take_along_axis(probabilities, order, 1)
    weights, ids, _ = npu.npu_moe_gating_top_k(logits, 3)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, chosen, rtol=1e-5)
    weights, ids, _ = npu.npu_moe_gating_top_k_softmax_v2(logits, k=3, renorm=1)
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(weights, chosen / chosen.sum(axis=1, keepdims=True), rtol=1e-5)


def test_routing_there_and_back_is_the_weighted_sum():
    tokens, k, experts = 5, 2, 4
    x, weights, skip = normal(tokens, 16), normal(tokens, k, seed=1), normal(tokens, 16, seed=2)
    ids = torch.tensor([[0, 2], [2, 1], [0, 1], [3, 0], [2, 3]], dtype=torch.int32)
    rows, index, counts, _ = npu.npu_moe_init_routing_v2(
        x, ids, expert_num=experts, expert_tokens_num_type=1, expert_tokens_num_flag=True
    )
    assert counts.tolist() == [3, 2, 3, 2]
    owner = np.repeat(np.arange(experts), counts)
    out = npu.npu_moe_finalize_routing(
        rows * torch.tensor(owner + 1.0)[:, None].float(), skip, None, None, weights, index, ids, drop_pad_mode=2
    )
    expected = skip.double().numpy()
    for token in range(tokens):
        for j in range(k):
            expected[token] += weights[token, j].item() * (ids[token, j].item() + 1) * x[token].double().numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def complex_rotation(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Each pair as a complex number turned by its angle, real parts first."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rope_turns_pairs_and_returns_halves():
    x, angle = normal(3, 2, 1, 64), normal(3, 32, seed=1)
    cos, sin = (torch.cat([f(angle)] * 2, -1).view(3, 1, 1, 64) for f in (torch.cos, torch.sin))
    out = npu.npu_interleave_rope(x, cos, sin)
    expected = complex_rotation(x.double().numpy(), angle.double().numpy()[:, None, None])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["PA_NZ", "PA"])
def test_cache_writes_land_where_the_layout_says(mode):
    kv, gamma, angle = normal(3, 1, 1, 576), normal(512, seed=1), normal(3, 32, seed=2)
    cos, sin = (torch.cat([f(angle)] * 2, -1).view(3, 1, 1, 64) for f in (torch.cos, torch.sin))
    rope_cache, latent_cache = torch.zeros(4, SLOTS_PER_PAGE, 1, 64), torch.zeros(4, SLOTS_PER_PAGE, 1, 512)
    slots = torch.tensor([37, -1, 5])
    _, _, rope_out, latent_out = npu.npu_kv_rmsnorm_rope_cache(
        kv, gamma, cos, sin, slots, rope_cache, latent_cache, epsilon=1e-6, cache_mode=mode, is_output_kv=True
    )
    values = kv.double().numpy().reshape(3, 576)
    latent = values[:, :512] / np.sqrt((values[:, :512] ** 2).mean(1, keepdims=True) + 1e-6) * gamma.double().numpy()
    rope = complex_rotation(values[:, 512:], angle.double().numpy())
    np.testing.assert_allclose(latent_out.flatten(0, 2), latent, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rope_out.flatten(0, 2), rope, rtol=1e-4, atol=1e-5)
    for cache, rows in ((latent_cache, latent), (rope_cache, rope)):
        flat, width = cache.flatten().numpy(), rows.shape[1]
        for token in (0, 2):
            page, offset = divmod(int(slots[token]), SLOTS_PER_PAGE)
            for channel in (0, 15, 16, 17, width - 1):
                nz = ((page * (width // 16) + channel // 16) * SLOTS_PER_PAGE + offset) * 16 + channel % 16
                nd = (page * SLOTS_PER_PAGE + offset) * width + channel
                assert flat[nz if mode == "PA_NZ" else nd] == pytest.approx(rows[token, channel], rel=1e-4, abs=1e-5)
        assert np.count_nonzero(flat) == 2 * width, "a negative slot is not written"


def attention(q, k, v, scale, causal):
    """One head in float64: (out, log-sum-exp)."""
    scores = q @ k.T * scale
    if causal:
        offset = len(k) - len(q)
        scores[np.arange(len(k))[None] > np.arange(len(q))[:, None] + offset] = -np.inf
    largest = scores.max(1, keepdims=True)
    lse = np.log(np.exp(scores - largest).sum(1, keepdims=True)) + largest
    return np.exp(scores - lse) @ v, lse


def test_ragged_attention():
    heads, lengths = 2, [3, 8]
    q, k, v = (normal(8, heads, 128, seed=s) for s in range(3))
    q_rope, k_rope = (normal(8, heads, 64, seed=s) for s in (3, 4))
    mask = torch.ones(2048, 2048).triu(1).bool()
    out, lse = npu.npu_fused_infer_attention_score(
        q, k, v, query_rope=q_rope, key_rope=k_rope, atten_mask=mask, sparse_mode=3, num_heads=heads, scale=0.1,
        actual_seq_lengths=lengths, actual_seq_lengths_kv=lengths, input_layout="TND", softmax_lse_flag=True,
    )  # fmt: skip
    full_q, full_k = (torch.cat(pair, -1).double().numpy() for pair in ((q, q_rope), (k, k_rope)))
    for start, end in ((0, 3), (3, 8)):
        for head in range(heads):
            rows = slice(start, end)
            expected = attention(
                full_q[rows, head], full_k[rows, head], v[rows, head].double().numpy(), 0.1, causal=True
            )
            np.testing.assert_allclose(out[rows, head], expected[0], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(lse[rows, head], expected[1], rtol=1e-4, atol=1e-5)


def test_batched_attention_without_rotary_arguments():
    heads, mask = 3, torch.ones(2048, 2048).triu(1).bool()
    q, k, v = normal(2, 3, heads, 256), normal(2, 5, heads, 256, seed=1), normal(2, 5, heads, 256, seed=2)
    out, lse = npu.npu_fused_infer_attention_score(
        q, k, v, atten_mask=mask, sparse_mode=3, num_heads=heads, num_key_value_heads=heads, scale=0.1,
        actual_seq_lengths=[3, 3], actual_seq_lengths_kv=[5, 5], input_layout="BSND", softmax_lse_flag=True,
    )  # fmt: skip
    for row, head in np.ndindex(2, heads):
        one = (tensor[row, :, head].double().numpy() for tensor in (q, k, v))
        expected = attention(*one, 0.1, causal=True)
        np.testing.assert_allclose(out[row, :, head], expected[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lse[row, head], expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"v": 128}, {"k": 128}, {"q": 528, "k": 528, "v": 528}, {"q": 24, "k": 24, "v": 24}]
)
def test_batched_attention_refuses_widths_that_are_not_documented(change):
    q, k, v = (normal(1, 4, 2, change.get(name, 256)) for name in "qkv")
    with pytest.raises((emulate.RefusedError, RuntimeError)):
        npu.npu_fused_infer_attention_score(q, k, v, num_heads=2, input_layout="BSND", scale=0.1)


@pytest.mark.parametrize("layout", ["nz", "nd"])
def test_paged_attention_reads_pages_through_the_table(layout):
    heads, size, lengths = 2, SLOTS_PER_PAGE, [20, 5]
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    keys = {0: normal(20, 576), 1: normal(5, 576, seed=1)}
    latent, rope = torch.full((5, size, 512), float("nan")), torch.full((5, size, 64), float("nan"))
    for sequence, rows in keys.items():
        for token, row in enumerate(rows):
            page = table[sequence, token // size]
            latent[page, token % size], rope[page, token % size] = row[:512], row[512:]
    if layout == "nz":
        latent, rope = (
            cache.view(5, size, -1, 16).transpose(1, 2).contiguous().unsqueeze(1) for cache in (latent, rope)
        )
    q, q_rope = normal(2, heads, 512, seed=2), normal(2, heads, 64, seed=3)
    out, _ = npu.npu_fused_infer_attention_score(
        q, latent, latent, query_rope=q_rope, key_rope=rope, num_heads=heads, num_key_value_heads=1, scale=0.05,
        actual_seq_lengths=[1, 2], actual_seq_lengths_kv=lengths, block_table=table, block_size=size,
        input_layout="TND_NTD",
    )  # fmt: skip
    assert out.shape == (heads, 2, 512)
    full = torch.cat([q, q_rope], -1).double().numpy()
    for sequence, rows in keys.items():
        stored = rows.double().numpy()
        for head in range(heads):
            expected, _ = attention(full[sequence, head][None], stored, stored[:, :512], 0.05, causal=False)
            np.testing.assert_allclose(out[head, sequence], expected[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_token", [True, False])
def test_int8_attention_multiplies_both_parts_by_the_scales(by_token):
    heads, size, lengths = 2, 128, [150, 5]
    generator = torch.Generator().manual_seed(3)
    latent = torch.randint(-128, 128, (4, 1, 16, size, 32), generator=generator, dtype=torch.int8)
    q = torch.randint(-128, 128, (2, heads, 512), generator=generator, dtype=torch.int8)
    rope, q_rope, scale = normal(4, 1, 4, size, 16), normal(2, heads, 64, seed=1), normal(2, heads, seed=2).abs() / 99
    table = torch.tensor([[3, 1], [2, 0]], dtype=torch.int32)
    one = torch.ones(1)
    wide = (lambda x: x) if by_token else (lambda x: x.unsqueeze(1))
    out, _ = npu.npu_fused_infer_attention_score_v2(
        wide(q), latent, latent, query_rope=wide(q_rope), key_rope=rope, num_query_heads=heads, num_key_value_heads=1,
        softmax_scale=0.05, actual_seq_qlen=[1, 2] if by_token else None, actual_seq_kvlen=lengths, block_table=table,
        block_size=size, dequant_scale_query=wide(scale), dequant_scale_key=0.5 * one, dequant_scale_value=0.25 * one,
        query_quant_mode=3, input_layout="TND_NTD" if by_token else "BSND_NBSD",
    )  # fmt: skip
    for sequence, length in enumerate(lengths):
        k, kr = np.zeros((length, 512)), np.zeros((length, 64))
        for token, channel in np.ndindex(length, 512):
            page, row = table[sequence, token // size], token % size
            k[token, channel] = latent[page, 0, channel // 32, row, channel % 32]
            if channel < 64:
                kr[token, channel] = rope[page, 0, channel // 16, row, channel % 16]
        for head in range(heads):
            sums = k @ q[sequence, head].double().numpy() + kr @ q_rope[sequence, head].double().numpy()
            weights = np.exp(0.05 * 0.5 * float(scale[sequence, head]) * (sums - sums.max()))
            expected = weights / weights.sum() @ k * 0.25
            np.testing.assert_allclose(out[head, sequence].flatten(), expected, rtol=1e-4, atol=1e-3)


def test_update_merges_attention_over_two_halves_of_the_keys():
    q, k, v = (normal(4, 16, seed=s).double().numpy() for s in range(3))
    whole, _ = attention(q, k, v, 0.3, causal=False)
    parts = [attention(q, k[half], v[half], 0.3, causal=False) for half in (slice(0, 1), slice(1, 4))]
    lses = [torch.tensor(lse).float().flatten() for _, lse in parts]
    merged, _ = npu.npu_attention_update(lses, [torch.tensor(out).float() for out, _ in parts], 0)
    np.testing.assert_allclose(merged, whole, rtol=1e-5, atol=1e-6)


def test_unwritten_outputs_are_poison():
    kv, gamma, table = normal(1, 1, 1, 576), normal(512, seed=1), torch.ones(1, 1, 1, 64)
    caches = torch.zeros(1, SLOTS_PER_PAGE, 1, 64), torch.zeros(1, SLOTS_PER_PAGE, 1, 512)
    *_, rope, latent = npu.npu_kv_rmsnorm_rope_cache(
        kv, gamma, table, table, torch.tensor([0]), *caches, cache_mode="PA_NZ"
    )
    assert rope.isnan().all() and latent.isnan().all()
    assert npu.npu_moe_gating_top_k(normal(2, 8), 2)[2].isnan().all()


def test_a_shape_that_torch_npu_does_not_expect_is_refused(monkeypatch):
    monkeypatch.setitem(emulate._semantics, "npu_swiglu", lambda input, dim=-1: input)
    with pytest.raises(emulate.RefusedError, match="torch_npu's shape rules"):
        emulate._checked("npu_swiglu", emulate._semantics["npu_swiglu"])(normal(2, 8))


def test_an_argument_that_is_not_emulated_is_refused():
    with pytest.raises(emulate.RefusedError, match="group_index"):
        npu.npu_dynamic_quant(normal(2, 8), group_index=torch.tensor([2], dtype=torch.int32))


def test_narrow_rules_refuse_float32_activations():
    with emulate.use_rules(wide=False), pytest.raises(emulate.RefusedError, match=r"float32"):
        npu.npu_dynamic_quant(normal(2, 8))
