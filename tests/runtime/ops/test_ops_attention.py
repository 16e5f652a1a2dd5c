"""Rope, the paged cache and attention against numpy in float64; both CPU sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import Decode, Keys, Lengths, Ops, Positions, Queries


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
    out = ops.rotary.interleave_rope(torch.from_numpy(x), *tables(angles))
    np.testing.assert_allclose(out.numpy(), complex_rope(x, angles[:, None]), atol=1e-5)


def test_cache_bytes_and_outputs(ops: Ops) -> None:
    """kv_rmsnorm_rope_cache: which number lies at which place of both pools, and what it returns."""
    rng = np.random.default_rng(4)
    latent_size, rope_size, block_size = 32, 16, 16
    kv = rng.standard_normal((5, latent_size + rope_size)).astype(np.float32)
    gamma, angles = rng.uniform(0.5, 2, latent_size).astype(np.float32), rng.uniform(0, 6, (5, 8))
    cache = ops.caches.new((Pool("latent", latent_size), Pool("rope", rope_size)), 3, block_size)
    slots = [40, 3, -1, 15, 16]
    positions = Positions(torch.tensor(slots), *tables(angles))
    written = ops.mla.kv_rmsnorm_rope_cache(
        torch.from_numpy(kv), torch.from_numpy(gamma), 1e-6, positions, cache, output_kv=True
    )
    latent = kv[:, :latent_size].astype(np.float64)
    latent = latent / np.sqrt((latent**2).mean(1, keepdims=True) + 1e-6) * gamma
    rope = complex_rope(kv[:, latent_size:], angles)
    assert written is not None
    np.testing.assert_allclose(written[0].numpy(), rope, atol=1e-5)
    np.testing.assert_allclose(written[1].numpy(), latent, atol=1e-5)
    for pool, rows in ((cache["latent"].tensor, latent), (cache["rope"].tensor, rope)):
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
    queries = Queries(*map(torch.from_numpy, (q_nope, q_rope)))
    keys = Keys(*map(torch.from_numpy, (k_nope, k_rope, value)))
    out, lse = ops.mla.fused_infer_attention(queries, keys, Lengths(q_lens, kv_lens, causal), 0.3)
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
    merged = ops.mla.attention_update(*([torch.from_numpy(part[i]).float() for part in parts] for i in range(2)))
    np.testing.assert_allclose(merged.numpy(), golden_attention(query, key, value, 1.0, False)[0], atol=1e-5)


def test_paged_attention_reads_only_its_blocks(ops: Ops) -> None:
    """Latents scattered over blocks, everything else NaN; several queries of a sequence are causal."""
    rng = np.random.default_rng(10)
    heads, latent_size, rope_size, block_size = 2, 32, 16, 16
    cache = ops.caches.new((Pool("latent", latent_size), Pool("rope", rope_size)), 8, block_size)
    cache["latent"].tensor.fill_(float("nan"))
    cache["rope"].tensor.fill_(float("nan"))
    blocks, lengths, queries = [[6, 2], [5, 0, 3]], [20, 33], [1, 3]
    sequences = []
    for table, length in zip(blocks, lengths, strict=True):
        latent, rope = (rng.standard_normal((length, size)).astype(np.float32) for size in (latent_size, rope_size))
        for token in range(length):
            block, offset = table[token // block_size], token % block_size
            cache["latent"].tensor[block, :, offset] = torch.from_numpy(latent[token]).view(-1, 16)
            cache["rope"].tensor[block, :, offset] = torch.from_numpy(rope[token]).view(-1, 16)
        sequences.append((latent, rope))
    q_latent = rng.standard_normal((4, heads, latent_size)).astype(np.float32)
    q_rope = rng.standard_normal((4, heads, rope_size)).astype(np.float32)
    decode = Decode((1, 4), tuple(lengths), torch.tensor([[6, 2, 0], [5, 0, 3]], dtype=torch.int32))
    out = ops.mla.fused_infer_attention_paged(torch.from_numpy(q_latent), torch.from_numpy(q_rope), cache, decode, 0.2)
    first = 0
    for (latent, rope), count in zip(sequences, queries, strict=True):
        rows = slice(first, first + count)
        query = np.concatenate([q_latent[rows], q_rope[rows]], -1)
        key = np.repeat(np.concatenate([latent, rope], -1)[:, None], heads, 1)
        golden, _ = golden_attention(query, key, np.repeat(latent[:, None], heads, 1), 0.2, True)
        np.testing.assert_allclose(out[rows].numpy(), golden, atol=1e-5)
        first += count
    gathered = ops.caches.gather(cache, torch.tensor([0, 3], dtype=torch.int32), 17)
    for tensor, whole in zip(gathered.values(), sequences[1], strict=True):
        assert np.array_equal(tensor.numpy(), whole[16:33])
