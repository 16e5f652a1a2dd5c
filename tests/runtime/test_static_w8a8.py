"""Static W8A8 linears of the CPU sets against numpy: codes, integers, order of operations."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from npuq.errors import ArtifactError, BackendError
from npuq.formats.schemes import Scheme
from npuq.formats.static_w8a8 import input_scale_of, quantize_static
from npuq.quant.scales import Method
from npuq.runtime.ops import LinearPart, Ops, Quantized, Static


def part(outputs: int, inputs: int, low: float = -2.0, high: float = 5.0) -> tuple[LinearPart, dict[str, torch.Tensor]]:
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
    tensors = dict(quantize_static(weight, low, high, Method.MINMAX).tensors)
    static = Static(input_scale_of(tensors), tensors["deq_scale"], tensors["quant_bias"])
    return LinearPart(f"linear{outputs}", Scheme.W8A8_STATIC, tensors["weight"], static=static), tensors


@pytest.mark.parametrize("inputs", [64, 1030, 2080])  # past the length that float32 sums exactly
def test_a_fused_linear_is_integer_exact(ops: Ops, inputs: int) -> None:
    parts = [part(outputs, inputs) for outputs in (6, 10)]
    x = np.random.default_rng(inputs).uniform(-3.0, 6.0, (4, inputs)).astype(np.float32)
    x[0] = 100.0  # beyond the range: saturates
    out = ops.products.linear(torch.from_numpy(x), ops.weights.linear_of([stored for stored, _ in parts])).numpy()
    for (stored, tensors), got in zip(parts, np.split(out, [6], axis=1), strict=True):
        assert stored.static is not None
        inputs_ = stored.static.inputs
        factor = np.float32(1) / np.float32(inputs_.scale)
        codes = np.clip(np.rint(x * factor + np.float32(inputs_.offset)), -128, 127).astype(np.int64)
        assert codes.max() == 127
        sums = codes @ tensors["weight"].numpy().astype(np.int64).T + tensors["quant_bias"].numpy()
        np.testing.assert_array_equal(got, sums.astype(np.float32) * tensors["deq_scale"].numpy())


def test_parts_that_run_as_one_share_their_input_scale(ops: Ops) -> None:
    (one, _), (other, _) = part(4, 16), part(6, 16, high=7.0)
    with pytest.raises(ArtifactError, match="must share input_scale and input_offset: linear4"):
        ops.weights.linear_of([one, other])


def test_rows_that_are_quantized_already_are_refused(ops: Ops) -> None:
    linear = ops.weights.linear_of([part(4, 16)[0]])
    with pytest.raises(BackendError, match="static W8A8 linear was given quantized rows"):
        ops.products.linear(Quantized(torch.zeros(2, 16, dtype=torch.int8), torch.ones(2)), linear)


def test_experts_are_refused(ops: Ops) -> None:
    with pytest.raises(ArtifactError, match="routed experts cannot have a static input scale"):
        ops.weights.experts_of([[part(4, 16)[0]]])
