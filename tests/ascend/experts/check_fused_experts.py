"""Gate and up of the experts with their activation in one operator: its rounding, its trial, and wrong calls of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ascend_rig import emulate, harness
from ascend_rig.mutants import Change, Mutant, mapped, setting, without

from npuq.formats.schemes import Scheme
from npuq.runtime.diagnostics.selftest.data import EXPERTS, HIDDEN, INNER, random_values, stored_part
from npuq.runtime.ops import Ops, Quantized
from npuq.runtime.ops.reference.routing import swiglu_quant_twice
from npuq.runtime.ranks.group import ALONE, Alone

FUSED = "npu_grouped_matmul_swiglu_quant_v2"
COUNTS = [3, 0, 2, 1, 4, 0, 5, 1]


def experts_of(ops: Ops, scheme: Scheme) -> Any:
    return ops.weights.experts_of(
        [[stored_part(scheme, INNER, HIDDEN, seed=10 * e + side) for side in (0, 1)] for e in range(EXPERTS)]
    )


def rows_of() -> Quantized:
    codes = (40 * random_values(sum(COUNTS) + 3, HIDDEN, seed=3)).clamp(-127, 127).to(torch.int8)
    return Quantized(codes, random_values(len(codes), seed=4).abs() / 100)


@pytest.mark.parametrize("scheme", [Scheme.W4A8, Scheme.W8A8])
def test_it_rounds_as_the_reference_specifies(scheme):
    with emulate.use_rules(wide=True):
        ops = harness.make("ascend", fused_experts=True)
        experts = experts_of(ops, scheme)
        assert ops.routing.fused.takes(experts)
        ours = ops.routing.fused.run(rows_of(), experts, torch.tensor(COUNTS))
    reference = harness.make("reference")
    rows, total = rows_of(), sum(COUNTS)
    valid = Quantized(rows.codes[:total], rows.scale[:total])
    product = reference.products.grouped_matmul(valid, experts_of(reference, scheme), torch.tensor(COUNTS))
    theirs = swiglu_quant_twice(product)
    torch.testing.assert_close(ours.scale[:total], theirs.scale, rtol=1e-5, atol=0)
    off = (ours.codes[:total].int() - theirs.codes.int()).abs()
    assert off.max() <= 1 and off.float().mean() < 2e-3
    once = reference.norms.dequant_swiglu_quant(product)
    moved = (once.codes.int() - theirs.codes.int()).abs()
    assert moved.max() == 1 and float(off.float().mean()) < float(moved.float().mean()) < 0.03
    assert (ours.codes[total:] == 111).all() and ours.scale[total:].isnan().all()  # rows of no expert


@pytest.mark.parametrize("name", ["example", "kimi-w8a8", "prolog"])
def test_generations_agree_with_two_operators(artifact, name):
    with emulate.use_rules() as used:
        fused = harness.generate(artifact(name), harness.make("ascend", torch.bfloat16))
        assert used.calls[FUSED] > 1
    with emulate.use_rules() as used:
        plain = harness.generate(artifact(name), harness.make("ascend", torch.bfloat16, fused_experts=False))
        assert used.calls[FUSED] == 0
    assert harness.relative_error(fused.logits[:1], plain.logits[:1]) < 0.05


def test_two_operators_run_where_the_fused_one_is_refused(artifact):
    with emulate.use_rules(refuses_fused_experts=True) as used:
        ops = harness.make("ascend", torch.bfloat16)
        run = harness.generate(artifact("example"), ops)
        assert used.calls[FUSED] == 0 and ops.routing.fused.works is False
        assert "gate and up of the experts and their activation take two operators" in ops.findings()
    plain = harness.generate(artifact("example"), harness.make("ascend", torch.bfloat16, fused_experts=False))
    assert run.tokens == plain.tokens


def test_a_rank_where_the_trial_fails_decides_for_all():
    class Group(Alone):
        def all_reduce_max(self, tensor):
            return torch.ones_like(tensor)

    with emulate.use_rules(wide=True):
        for group, used in ((ALONE, True), (Group(), False)):
            ops = harness.make("ascend", fused_experts=True, group=group)
            assert ops.routing.fused.takes(experts_of(ops, Scheme.W4A8)) is used


MUTATIONS: dict[str, Change] = {
    "running sums": mapped(4, lambda counts: counts.cumsum(0)),
    "group_list_type left out": without("group_list_type"),
    "no bias": without("weight_assist_matrix"),
    "bias of another expert": mapped("weight_assist_matrix", lambda bias: [bias[0].roll(1, 0)]),
    "scale of another expert": mapped(2, lambda scale: [scale[0].roll(1, 0)]),
    "scale of a group": mapped(2, lambda scale: [scale[0].unsqueeze(1)]),
    "groups of scales": setting(dequant_mode=1),
    "rows in bfloat16": mapped(0, lambda rows: rows.bfloat16()),
    "scale of the rows in bfloat16": mapped(3, lambda scale: scale.bfloat16()),
    "scale of the rows doubled": mapped(3, lambda scale: 2 * scale),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_call_is_refused_or_fails_the_trial(name):
    with emulate.use_rules(wide=True):
        ops = harness.make("ascend", fused_experts=True)
        ops.npu.operators = Mutant(FUSED, MUTATIONS[name])
        try:
            used = ops.routing.fused.takes(experts_of(ops, Scheme.W4A8))
        except (emulate.RefusedError, TypeError) as error:
            print(f"{name}: {str(error).splitlines()[0]}")
            return
    assert ops.npu.operators.changed and not used
