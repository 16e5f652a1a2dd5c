"""Operators against numpy in float64, or against the documented rule written out; both CPU sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from npuq.errors import ArtifactError, BackendError
from npuq.formats.int4 import pack_int4
from npuq.formats.schemes import Scheme
from npuq.runtime.attention.pools import Pool
from npuq.runtime.backend import make_ops
from npuq.runtime.ops import LayerCache, LinearPart, Ops, Quantized

seeds = st.integers(0, 2**32 - 1)


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
    codes, scale = ops.norms.dynamic_quant(x)
    assert codes.tolist() == [[127, 0, 2, 2, 0, -2], [0] * 6]
    assert scale.tolist() == [1.0, 0.0]


def test_routing_quant_rounds_half_away_from_zero(ops: Ops) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    ids = torch.tensor([[1], [0]], dtype=torch.int32)
    rows, row_index, counts = ops.routing.moe_init_routing(x, ids, 3, quantize=True)
    assert isinstance(rows, Quantized)
    assert rows.codes.tolist() == [[0] * 6, [127, 1, 2, 3, -1, -2]]
    assert rows.scale.tolist() == [0.0, 1.0]
    assert row_index.tolist() == [1, 0]
    assert counts.tolist() == [1, 1, 0]


@settings(max_examples=30)
@given(seeds)
def test_dynamic_quant_against_float64(seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((5, 33)).astype(np.float32)
    codes, scale = make_ops("cpu").norms.dynamic_quant(torch.from_numpy(x))
    golden = x.astype(np.float64) * 127 / np.abs(x).max(1, keepdims=True)
    assert np.abs(codes.numpy() - golden).max() <= 0.5 + 1e-4
    np.testing.assert_allclose(scale.numpy(), np.abs(x).max(1) / 127, rtol=1e-6)


def test_dequant_swiglu_quant_activates_the_left_half(ops: Ops) -> None:
    x = np.random.default_rng(1).standard_normal((7, 24)).astype(np.float32) * 3
    left, right = x[:, :12].astype(np.float64), x[:, 12:].astype(np.float64)
    golden = left / (1 + np.exp(-left)) * right
    codes, scale = ops.norms.dequant_swiglu_quant(torch.from_numpy(x))
    np.testing.assert_allclose(scale.numpy(), np.abs(golden).max(1) / 127, rtol=1e-5)
    assert np.abs(codes.numpy() - golden / scale.numpy()[:, None]).max() <= 0.5 + 1e-3
    np.testing.assert_allclose(ops.norms.swiglu(torch.from_numpy(x)).numpy(), golden, atol=1e-5)


# ---- matmuls ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", [64, 1030, 2080])  # past the length that float32 sums exactly
def test_w8a8_linear_is_integer_exact(ops: Ops, inputs: int) -> None:
    rng = np.random.default_rng(inputs)
    parts = [random_part(rng, Scheme.W8A8, outputs, inputs) for outputs in (6, 10)]
    codes = rng.integers(-127, 128, (3, inputs))
    codes[0] = -127
    scale = rng.uniform(0.001, 0.1, 3).astype(np.float32)
    x = Quantized(torch.from_numpy(codes.astype(np.int8)), torch.from_numpy(scale))
    out = ops.products.linear(x, ops.weights.w8a8_linear([part for part, _ in parts])).numpy()
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
    handle = ops.weights.experts_of([[part for part, _ in expert] for expert in parts])
    out = ops.products.grouped_matmul(x, handle, torch.tensor(counts)).numpy()
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
    torch.testing.assert_close(
        ops.products.linear(x, ops.weights.float_linear(weights)).double(), golden, rtol=1e-5, atol=1e-5
    )


def test_schemes_are_not_mixed(ops: Ops) -> None:
    rng = np.random.default_rng(0)
    eight, _ = random_part(rng, Scheme.W8A8, 4, 16)
    four, _ = random_part(rng, Scheme.W4A8, 4, 16)
    plain = LinearPart("plain", Scheme.FLOAT, torch.zeros(4, 16))
    with pytest.raises(ArtifactError, match=r"some\.linear \(W8A8_DYNAMIC\), plain \(FLOAT\)"):
        ops.weights.linear_of([eight, plain])
    with pytest.raises(ArtifactError, match="W4A8_DYNAMIC"):
        ops.weights.linear_of([four])
    with pytest.raises(ArtifactError, match="share one scheme"):
        ops.weights.experts_of([[eight], [four]])


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_norms(ops: Ops) -> None:
    rng = np.random.default_rng(11)
    x, residual = (rng.standard_normal((4, 24)).astype(np.float32) for _ in range(2))
    gamma = rng.uniform(0.5, 2, 24).astype(np.float32)

    def golden(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64)
        return values / np.sqrt((values**2).mean(1, keepdims=True) + 1e-5) * gamma

    tensors = [torch.from_numpy(array) for array in (x, residual, gamma)]
    np.testing.assert_allclose(ops.norms.rms_norm(tensors[0], tensors[2], 1e-5).numpy(), golden(x), atol=1e-5)
    normed, total = ops.norms.add_rms_norm(*tensors, 1e-5)
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
    assert torch.equal(ops.norms.rms_norm(x, gamma, 1e-6), once)
    assert torch.equal(ops.norms.add_rms_norm(x, torch.zeros_like(x), gamma, 1e-6)[0], twice)


# ---- backends --------------------------------------------------------------------------------------------------------


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendError, match="'tpu' is unknown"):
        make_ops("tpu")
    with pytest.raises(BackendError, match="npu:0"):
        make_ops("cpu", device="npu:0")
    with pytest.raises(BackendError, match="compute dtype"):
        make_ops("reference", torch.float64)


def test_cache_pools_are_zero_and_typed() -> None:
    cache = make_ops("cpu", torch.bfloat16).caches.new((Pool("latent", 64), Pool("rope", 32)), 3, 16)
    assert isinstance(cache, LayerCache)
    assert cache["latent"].tensor.shape == (3, 4, 16, 16)
    assert cache["rope"].tensor.shape == (3, 2, 16, 16)
    assert cache["latent"].tensor.dtype == torch.bfloat16
    assert not cache["latent"].tensor.any()
