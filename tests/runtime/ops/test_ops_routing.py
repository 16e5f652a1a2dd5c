"""Routing operators against float64 and the documented rule; both CPU sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npuq.runtime.backend import make_ops
from npuq.runtime.ops import Gating, Ops

seeds = st.integers(0, 2**32 - 1)


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
    weights, ids = make_ops("reference").routing.moe_gating_top_k(
        torch.from_numpy(logits), None if bias is None else torch.from_numpy(bias), gating
    )
    golden_weights, golden_ids = golden_routing(logits, bias, gating)
    assert np.array_equal(ids.numpy(), golden_ids)
    assert ids.dtype == torch.int32
    np.testing.assert_allclose(weights.numpy(), golden_weights, rtol=1e-5)


def test_equal_scores_go_to_the_lower_expert(ops: Ops) -> None:
    _, ids = ops.routing.moe_gating_top_k(torch.zeros(1, 8), None, Gating(3, "softmax", 4, 2))
    assert ids.tolist() == [[0, 1, 2]]


def test_bias_chooses_but_does_not_weigh(ops: Ops) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    weights, ids = ops.routing.moe_gating_top_k(logits, bias, Gating(2, "sigmoid", renormalize=True))
    assert ids.tolist() == [[3, 0]]
    chosen = torch.sigmoid(torch.tensor([-1.0, 2.0]))
    torch.testing.assert_close(weights[0], chosen / chosen.sum())


@settings(max_examples=25)
@given(seed=seeds)
def test_routing_round_trip(ops: Ops, seed: int) -> None:
    """Every copy of a token goes to its expert's rows, and comes back weighted."""
    rng = np.random.default_rng(seed)
    tokens, k, experts, hidden = int(rng.integers(1, 9)), 3, 7, 5
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(experts)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.uniform(size=(tokens, k)).astype(np.float32)
    rows, row_index, counts = ops.routing.moe_init_routing(
        torch.from_numpy(x), torch.from_numpy(ids), experts, quantize=False
    )
    assert isinstance(rows, torch.Tensor)
    assert counts.tolist() == np.bincount(ids.ravel(), minlength=experts).tolist()
    of_row = np.repeat(np.arange(experts), counts.numpy())
    assert np.array_equal(of_row[row_index.numpy()].reshape(tokens, k), ids)
    factor = 1.0 + of_row[:, None]  # what expert e does: multiply by 1 + e
    skip = rng.standard_normal((tokens, hidden)).astype(np.float32)
    out = ops.routing.moe_finalize_routing(
        rows * torch.from_numpy(factor).float(),
        torch.from_numpy(weights),
        row_index,
        torch.from_numpy(ids),
        torch.from_numpy(skip),
    )
    golden = skip + (weights.astype(np.float64) * (1 + ids)).sum(1, keepdims=True) * x
    np.testing.assert_allclose(out.numpy(), golden, rtol=1e-5, atol=1e-5)
