"""The rig's semantics of sparse attention against numpy, row by row from the documented formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ascend_rig import emulate, harness

npu = torch.ops.npu
SIZE = 16
# Three sequences: the last two queries of one over two pages, one query, and a whole sequence.
Q_COUNTS, KV_LENS = [2, 1, 5], [20, 9, 5]
TABLE = [[3, 1], [2, 0], [4, 0]]
TOKENS = sum(Q_COUNTS)


@pytest.fixture(autouse=True)
def _wide():
    with emulate.use_rules(wide=True):
        yield


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ends = torch.tensor(Q_COUNTS).cumsum(0)
    return ends.int(), torch.tensor(KV_LENS, dtype=torch.int32), torch.tensor(TABLE, dtype=torch.int32)


def queries() -> list[tuple[int, int, int]]:
    """(row, sequence, position) of each query: the last ones of their sequences."""
    found = []
    for sequence, (count, length) in enumerate(zip(Q_COUNTS, KV_LENS, strict=True)):
        found += [(len(found) + i, sequence, length - count + i) for i in range(count)]
    return found


def row_of(pages: np.ndarray, sequence: int, position: int) -> np.ndarray:
    return pages[TABLE[sequence][position // SIZE], position % SIZE, 0]


@pytest.mark.parametrize("count", [1, 4, 16, 2048])
def test_the_indexer_selects_the_largest_scores(count):
    query, weights, pages = normal(TOKENS, 16, 128), normal(TOKENS, 16, seed=1), normal(5, SIZE, 1, 128, seed=2)
    ends, kv_lens, table = lengths()
    selected, nothing = npu.npu_lightning_indexer(
        query, pages, weights, actual_seq_lengths_query=ends, actual_seq_lengths_key=kv_lens, block_table=table,
        layout_query="TND", layout_key="PA_BSND", sparse_count=count, sparse_mode=3,
    )  # fmt: skip
    assert selected.shape == (TOKENS, 1, count) and selected.dtype == torch.int32 and nothing.numel() == 0
    for row, sequence, position in queries():
        scores = []
        for key in range(position + 1):
            k = row_of(pages.double().numpy(), sequence, key)
            each = [max(0.0, float(q @ k)) for q in query[row].double().numpy()]
            scores.append(float(np.dot(weights[row].double().numpy(), each)))
        expected = set(np.argsort(scores)[::-1][:count].tolist())
        found = selected[row, 0].tolist()
        valid = min(count, position + 1)
        assert set(found[:valid]) == expected and found[valid:] == [-1] * (count - valid)


def test_attention_is_to_the_selected_tokens_alone():
    heads, scale, generator = 2, 0.05, torch.Generator().manual_seed(5)
    q, q_rope = normal(TOKENS, heads, 512), normal(TOKENS, heads, 64, seed=1)
    latent, rope = normal(5, SIZE, 1, 512, seed=2), normal(5, SIZE, 1, 64, seed=3)
    selected = torch.full((TOKENS, 1, 6), -1, dtype=torch.int32)
    for row, _, position in queries():
        found = torch.randperm(position + 1, generator=generator)[:6]
        selected[row, 0, : len(found)] = found.int()
    ends, kv_lens, table = lengths()
    out, *_ = npu.npu_sparse_flash_attention(
        q, latent, latent, selected, scale, block_table=table, actual_seq_lengths_query=ends,
        actual_seq_lengths_kv=kv_lens, query_rope=q_rope, key_rope=rope, sparse_block_size=1, layout_query="TND",
        layout_kv="PA_BSND", sparse_mode=3, attention_mode=2,
    )  # fmt: skip
    for row, sequence, _ in queries():
        found = [index for index in selected[row, 0].tolist() if index >= 0]
        values = np.stack([row_of(latent.double().numpy(), sequence, index) for index in found])
        ropes = np.stack([row_of(rope.double().numpy(), sequence, index) for index in found])
        for head in range(heads):
            scores = values @ q[row, head].double().numpy() + ropes @ q_rope[row, head].double().numpy()
            weights = np.exp(scale * (scores - scores.max()))
            expected = weights / weights.sum() @ values
            np.testing.assert_allclose(out[row, head], expected, rtol=1e-4, atol=1e-5)


def test_rotary_mul_turns_halves_or_neighbours():
    x, angles = normal(1, 3, 2, 64), normal(3, 32, seed=1)
    half = npu.npu_rotary_mul(x, *(each.repeat(1, 2)[None, :, None] for each in (angles.cos(), angles.sin())))
    tables = (each.repeat_interleave(2, -1)[None, :, None] for each in (angles.cos(), angles.sin()))
    pairs = npu.npu_rotary_mul(x, *tables, rotary_mode="interleave")
    for token, head, i in np.ndindex(3, 2, 32):
        turn = complex(np.exp(1j * float(angles[token, i])))
        row = x[0, token, head]
        expected = turn * complex(row[i], row[i + 32])
        got = half[0, token, head]
        assert abs(complex(got[i], got[i + 32]) - expected) < 1e-5
        expected = turn * complex(row[2 * i], row[2 * i + 1])
        got = pairs[0, token, head]
        assert abs(complex(got[2 * i], got[2 * i + 1]) - expected) < 1e-5


def test_attention_of_128_heads_leaves_the_latent_space():
    """128 heads of 512 channels are more than the kernel transposes: they are copied head by head."""
    products = harness.make("ascend").products
    for heads in (64, 128):
        attended, w_uv = normal(2, heads, 512), normal(heads, 512, 16, seed=1)
        out = products.batch_matmul(attended, w_uv)
        expected = np.einsum("tnl,nlv->tnv", attended.double().numpy(), w_uv.double().numpy())
        np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(emulate.RefusedError, match="must be below 65536"):
        npu.npu_transpose_batchmatmul(attended, w_uv, perm_x1=(1, 0, 2), perm_y=(1, 0, 2))
