"""Hyper-connections of the reference backend against the formulas in float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npuq.runtime.ops.hyper_connections import HyperWeights
from npuq.runtime.ops.reference.hyper_connections import ReferenceHyperOps

T, N, H, ITERATIONS, EPS, NORM_EPS = 5, 4, 12, 20, 1e-6, 1e-5
RNG = np.random.default_rng(5)
STREAMS = RNG.standard_normal((T, N, H))
OUTPUT = RNG.standard_normal((T, H))


def _weights(rows: int, scales: int) -> tuple[HyperWeights, list[np.ndarray]]:
    arrays = [RNG.standard_normal(shape) for shape in ((rows, N * H), (rows,), (scales,))]
    tensors = [torch.from_numpy(array).float() for array in arrays]
    return HyperWeights(*tensors, iterations=ITERATIONS, eps=EPS, norm_eps=NORM_EPS), arrays


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _projected(fn: np.ndarray) -> np.ndarray:
    flat = STREAMS.reshape(T, -1)
    return flat / np.sqrt((flat**2).mean(-1, keepdims=True) + NORM_EPS) @ fn.T


def test_a_block_reads_writes_and_mixes_the_streams() -> None:
    weights, (fn, base, scale) = _weights((2 + N) * N, 3)
    f = _projected(fn)
    pre = _sigmoid(f[:, :N] * scale[0] + base[:N]) + EPS
    post = 2 * _sigmoid(f[:, N : 2 * N] * scale[1] + base[N : 2 * N])
    comb = np.exp(f[:, 2 * N :] * scale[2] + base[2 * N :]).reshape(T, N, N)
    comb = comb / comb.sum(-1, keepdims=True) + EPS
    for iteration in range(ITERATIONS):
        if iteration:
            comb /= comb.sum(-1, keepdims=True) + EPS
        comb /= comb.sum(-2, keepdims=True) + EPS

    ops = ReferenceHyperOps()
    block_input, ours_post, ours_comb = ops.connect(torch.from_numpy(STREAMS).float(), weights)
    np.testing.assert_allclose(block_input, np.einsum("ti,tih->th", pre, STREAMS), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours_post, post, rtol=1e-5)
    np.testing.assert_allclose(ours_comb, comb, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(ours_comb.sum(1), np.ones((T, N)), atol=1e-5)

    mixed = ops.mix(torch.from_numpy(STREAMS).float(), torch.from_numpy(OUTPUT).float(), ours_post, ours_comb)
    golden = post[:, :, None] * OUTPUT[:, None] + np.einsum("tij,tih->tjh", comb, STREAMS)
    np.testing.assert_allclose(mixed, golden, rtol=1e-4, atol=1e-4)


def test_the_last_norm_reads_the_streams() -> None:
    weights, (fn, base, scale) = _weights(N, 1)
    pre = _sigmoid(_projected(fn) * scale + base) + EPS
    ours = ReferenceHyperOps().collapse(torch.from_numpy(STREAMS).float(), weights)
    np.testing.assert_allclose(ours, np.einsum("ti,tih->th", pre, STREAMS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_keep_the_compute_dtype(dtype: torch.dtype) -> None:
    weights, _ = _weights((2 + N) * N, 3)
    ops, streams = ReferenceHyperOps(), torch.from_numpy(STREAMS).to(dtype)
    block_input, post, comb = ops.connect(streams, weights)
    assert block_input.dtype == dtype and post.dtype == comb.dtype == torch.float32
    assert ops.mix(streams, block_input, post, comb).dtype == dtype
