"""Cases of norms, products, routing and experts."""

from __future__ import annotations

from dataclasses import replace

import torch

from ....formats.schemes import Scheme
from ...ops import (
    Activation,
    Gating,
    MoeWeights,
    Ops,
    Quantized,
)
from .data import (
    DIVISION,
    EPS,
    EXPERTS,
    HIDDEN,
    INNER,
    TOKENS,
    TOP_K,
    WIDE,
    Case,
    gain,
    random_rows,
    random_values,
    random_weight,
    stored_part,
)


def norms(ops: Ops) -> tuple[Activation, ...]:
    x, residual, gamma = random_rows(ops, TOKENS, HIDDEN), random_rows(ops, TOKENS, HIDDEN, seed=1), gain(ops, HIDDEN)
    return ops.norms.rms_norm(x, gamma, EPS), *ops.norms.add_rms_norm(x, residual, gamma, EPS)


def layer_norm(ops: Ops) -> tuple[Activation, ...]:
    gamma, bias = (ops.weights.parameter(random_values(HIDDEN, seed=seed), torch.float32) for seed in (31, 32))
    return (ops.norms.layer_norm(random_rows(ops, TOKENS, HIDDEN), gamma, bias, EPS),)


def wide_swiglu(ops: Ops) -> tuple[Activation, ...]:
    """Values, not codes: a backend may round them to the compute dtype on the way, which moves large codes by one."""
    codes, scale = ops.norms.dequant_swiglu_quant(random_rows(ops, 2, 2 * WIDE))
    return (codes.float() * scale[:, None],)


def linear(scheme: Scheme) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        fused = [stored_part(scheme, outputs, HIDDEN, seed=outputs) for outputs in (INNER, 2 * INNER)]
        return (ops.products.linear(random_rows(ops, TOKENS, HIDDEN), ops.weights.linear_of(fused)),)

    return case


def divided_linear(scheme: Scheme) -> Case:
    """Multiply by a linear whose inputs two ranks would divide; beside it, 1 where that is the whole product's bits."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        rows, whole = random_rows(ops, TOKENS, HIDDEN), stored_part(scheme, INNER, HIDDEN, seed=INNER)
        expected = ops.products.linear(rows, ops.weights.linear_of([whole]))
        largest, sums, scale = ops.norms.row_maximum(rows), None, None
        for columns in DIVISION:
            part = ops.weights.linear_of([replace(whole, weight=whole.weight[:, columns].contiguous())])
            own = rows[:, columns].contiguous()
            if scheme is Scheme.W8A8_STATIC:
                codes = ops.products.static_quant(own, part)
            else:
                codes, scale = ops.norms.dynamic_quant_by(own, largest)
            product = ops.products.integer_sums(codes, part)
            sums = product if sums is None else sums + product
        assert sums is not None
        out = ops.products.scale_sums(sums, scale, part)
        return out, (out == expected).to(ops.dtype)

    return case


def divided_swiglu(ops: Ops) -> tuple[Activation, ...]:
    """Quantize activated rows that two ranks would divide; beside them, 1 where those of whole rows are the same."""
    gate_up = random_rows(ops, TOKENS, 2 * HIDDEN)
    expected = ops.norms.dequant_swiglu_quant(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    activated = [ops.norms.swiglu_float32(torch.cat([gate[:, own], up[:, own]], dim=-1)) for own in DIVISION]
    largest = torch.stack([ops.norms.row_maximum(part) for part in activated]).amax(0)
    parts = [ops.norms.swiglu_quant_by(part, largest) for part in activated]
    codes, scale = torch.cat([part.codes for part in parts], dim=-1), parts[0].scale
    same = (codes == expected.codes).to(ops.dtype), (scale == expected.scale).to(ops.dtype)
    return Quantized(codes, scale), *same


def grouped(scheme: Scheme) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        experts = ops.weights.experts_of(
            [[stored_part(scheme, INNER, HIDDEN, seed=10 * e + side) for side in (0, 1)] for e in range(EXPERTS)]
        )
        rows: Activation = random_rows(ops, 2 * EXPERTS, HIDDEN)
        counts = torch.tensor([3, 0, 2, 1, 4, 0, 5, 1]).to(ops.device)
        quantized = rows if scheme is Scheme.FLOAT else ops.norms.dynamic_quant(random_rows(ops, 2 * EXPERTS, HIDDEN))
        return (ops.products.grouped_matmul(quantized, experts, counts),)

    return case


def experts_inner(scheme: Scheme) -> Case:
    """Values of gate and up with their activation, which a backend may do in one operator that rounds codes twice."""

    def case(ops: Ops) -> tuple[Activation, ...]:
        gate_up, down = (
            ops.weights.experts_of(
                [[stored_part(scheme, outputs, inputs, seed=10 * e + side) for side in sides] for e in range(EXPERTS)]
            )
            for outputs, inputs, sides in ((INNER, HIDDEN, (0, 1)), (HIDDEN, INNER, (2,)))
        )
        router = ops.weights.router(random_weight(EXPERTS, HIDDEN, seed=5))
        weights = ops.routing.moe_of(MoeWeights(router, None, Gating(2, "softmax"), gate_up, down, EXPERTS, True))
        counts = torch.tensor([3, 0, 2, 1, 4, 0, 5, 1]).to(ops.device)
        rows = ops.norms.dynamic_quant(random_rows(ops, 2 * EXPERTS, HIDDEN))
        inner = ops.routing.experts_inner(rows, counts, weights)
        assert isinstance(inner, Quantized)
        return (inner.codes.float() * inner.scale[:, None],)

    return case


def gating_top_k(gating: Gating, biased: bool) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        bias = ops.weights.parameter(0.1 * random_values(4 * EXPERTS, seed=3), torch.float32) if biased else None
        return ops.routing.moe_gating_top_k(random_values(TOKENS, 4 * EXPERTS, seed=4).to(ops.device), bias, gating)

    return case


def routing(quantize: bool) -> Case:
    def case(ops: Ops) -> tuple[Activation, ...]:
        generator = torch.Generator().manual_seed(5)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
        ids = ids.to(torch.int32).to(ops.device)
        rows, index, counts = ops.routing.moe_init_routing(random_rows(ops, TOKENS, HIDDEN), ids, EXPERTS, quantize)
        weights = random_values(TOKENS, TOP_K, seed=6).abs().to(ops.device)
        back = random_rows(ops, TOKENS * TOP_K, HIDDEN, seed=7)
        out = ops.routing.moe_finalize_routing(back, weights, index, ids, random_rows(ops, TOKENS, HIDDEN, seed=8))
        return rows, index, counts, out

    return case
