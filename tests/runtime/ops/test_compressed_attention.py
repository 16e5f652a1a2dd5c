"""Compressed entries, their selection and attention with sinks, against the formulas in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npuq.runtime.ops.compressed_attention import CompressedAttention, Compressor
from npuq.runtime.ops.handles import Linear
from npuq.runtime.ops.reference import ReferenceOps

RNG = np.random.default_rng(11)
D = 8


@pytest.fixture(scope="module")
def ops() -> CompressedAttention:
    found = ReferenceOps().compressed
    assert found is not None
    return found


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).float()


def _compressor(ratio: int, series: int) -> tuple[Compressor, np.ndarray]:
    ape = RNG.standard_normal((ratio, series * D))
    return Compressor(Linear(), Linear(), _tensor(ape), torch.ones(D), ratio, 1e-6), ape


def _mixed(gates: np.ndarray, values: np.ndarray) -> np.ndarray:
    weights = np.exp(gates - gates.max(0))
    return (weights / weights.sum(0) * values).sum(0)


def test_an_entry_mixes_its_tokens_channel_by_channel(ops: CompressedAttention) -> None:
    compressor, ape = _compressor(4, 1)
    values, gates = RNG.standard_normal((12, D)), RNG.standard_normal((12, D))
    ours = ops.pool_windows(_tensor(np.concatenate([values, gates], 1)), compressor, absent=False)
    golden = [_mixed(gates[w : w + 4] + ape, values[w : w + 4]) for w in (0, 4, 8)]
    np.testing.assert_allclose(ours, golden, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("absent", [False, True])
def test_entries_overlap(ops: CompressedAttention, absent: bool) -> None:
    compressor, ape = _compressor(4, 2)
    values, gates = RNG.standard_normal((12, 2 * D)), RNG.standard_normal((12, 2 * D))
    ours = ops.pool_windows(_tensor(np.concatenate([values, gates], 1)), compressor, absent)
    golden = []
    for w in (4, 8):
        before, own = slice(w - 4, w), slice(w, w + 4)
        their_gates = [gates[before, :D] + ape[:, :D], gates[own, D:] + ape[:, D:]]
        their_values = [values[before, :D], values[own, D:]]
        first = 1 if absent and w == 4 else 0
        golden.append(_mixed(np.concatenate(their_gates[first:]), np.concatenate(their_values[first:])))
    np.testing.assert_allclose(ours, golden, rtol=1e-5, atol=1e-6)


def test_rotation_keeps_pairs_in_their_places(ops: CompressedAttention) -> None:
    x, positions, frequencies = RNG.standard_normal((3, 2, D)), np.array([0, 5, 1000]), np.array([1.0, 0.01])
    rotated = ops.rotate(_tensor(x), torch.from_numpy(positions), torch.from_numpy(frequencies))
    pairs = x[..., 4::2] + 1j * x[..., 5::2]
    turned = pairs * np.exp(1j * positions[:, None, None] * frequencies)
    golden = np.concatenate([x[..., :4], np.stack([turned.real, turned.imag], -1).reshape(3, 2, 4)], -1)
    np.testing.assert_allclose(rotated, golden, rtol=1e-5, atol=1e-5)
    back = ops.rotate(rotated, torch.from_numpy(positions), torch.from_numpy(frequencies), back=True)
    np.testing.assert_allclose(back, x, rtol=1e-5, atol=1e-5)


def test_selection_of_entries(ops: CompressedAttention) -> None:
    query, keys, weights = RNG.standard_normal((6, 5, D)), RNG.standard_normal((9, D)), RNG.standard_normal((6, 5))
    seen = np.array([0, 1, 3, 4, 8, 9])
    ours = ops.select_entries(_tensor(query), _tensor(weights), _tensor(keys), torch.from_numpy(seen), 3).numpy()
    scores = np.einsum("th,the->te", weights, np.maximum(np.einsum("thd,ed->the", query, keys), 0))
    for row, count in enumerate(seen):
        best = sorted(range(count), key=lambda entry: -scores[row, entry])[:3]
        assert sorted(np.flatnonzero(ours[row])) == sorted(best)


def test_of_equal_scores_the_earlier_entry_wins(ops: CompressedAttention) -> None:
    keys = torch.zeros(6, D)
    chosen = ops.select_entries(torch.ones(1, 2, D), torch.ones(1, 2), keys, torch.tensor([5]), 2)
    assert chosen[0].tolist() == [True, True, False, False, False, False]


def test_attention_with_sinks(ops: CompressedAttention) -> None:
    query, keys, sink = RNG.standard_normal((4, 3, D)), RNG.standard_normal((7, D)), RNG.standard_normal(3)
    visible = RNG.random((4, 7)) < 0.5
    visible[0] = False  # such a query attends to the sink alone
    ours = ops.sink_attention(_tensor(query), _tensor(keys), torch.from_numpy(visible), _tensor(sink), 0.3)
    weights = np.exp(np.einsum("thd,sd->ths", query, keys) * 0.3) * visible[:, None]
    golden = np.einsum("ths,sd->thd", weights / (weights.sum(-1) + np.exp(sink))[..., None], keys)
    np.testing.assert_allclose(ours, golden, rtol=1e-5, atol=1e-6)
    assert not ours[0].any()
