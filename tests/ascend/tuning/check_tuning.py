"""Tuning of the grouped matmul in the rig: measured, used in a generation, and without influence on results."""

from __future__ import annotations

import pytest
import torch
from ascend_rig import emulate, harness

from npuq.errors import BackendError
from npuq.runtime.backend import make_ops
from npuq.runtime.diagnostics import tune as tuning
from npuq.runtime.ops import Quantized
from npuq.runtime.ops.ascend.tuning.grouped_matmul import Expectation, MatmulShape, Tuning


class Everywhere(dict):
    """The same expectation for every shape."""

    def __init__(self, expectation: Expectation):
        super().__init__({None: expectation})
        self._expectation = expectation

    def get(self, shape, default=None):
        return self._expectation


@pytest.mark.parametrize("name", ["kimi", "kimi-w8a8"])
@pytest.mark.parametrize("expectation", [Expectation.MEAN, Expectation.EXPANDED])
def test_a_tuned_generation_is_the_same(artifact, name, expectation):
    path = artifact(name)
    with emulate.use_rules(wide=True):
        plain = harness.generate(path, harness.make("ascend"))
        tuned = harness.generate(path, harness.make("ascend", tuning=Tuning(Everywhere(expectation))))
    assert tuned.tokens == plain.tokens
    assert all(map(torch.equal, tuned.logits, plain.logits))


def told(ops, monkeypatch) -> list[list[int] | None]:
    """What the grouped matmuls are told from here on."""
    seen: list[list[int] | None] = []
    original = ops.npu.operators

    class Watched:
        def __getattr__(self, name):
            operator = getattr(original, name)
            if name != "npu_grouped_matmul":
                return operator
            return lambda *args, **kwargs: seen.append(kwargs.get("tuning_config")) or operator(*args, **kwargs)

    monkeypatch.setattr(ops.npu, "operators", Watched())
    return seen


def test_the_choice_of_a_shape_reaches_the_operator(artifact, monkeypatch):
    with emulate.use_rules(wide=True):
        ops = harness.make("ascend")
        layer = tuning._moe_layer(artifact("kimi"), ops)
        chosen = {
            MatmulShape.of(layer.gate_up, 64): Expectation.EXPANDED,
            MatmulShape.of(layer.down, 8): Expectation.MEAN,
        }
        ops.products.tuning = Tuning(chosen)
        seen = told(ops, monkeypatch)
        for weights in (layer.gate_up, layer.down):
            for rows in (7, 33, 64):
                inputs = weights.weight.shape[1]
                codes = torch.ones(rows, inputs, dtype=torch.int8)
                groups = torch.zeros(weights.weight.shape[0], dtype=torch.int64)
                groups[3] = rows
                ops.products.grouped_matmul(Quantized(codes, torch.ones(rows)), weights, groups)
    # gate|up has 128 outputs: more than 32 rows for an expert expand it. 24 experts: of 7 rows the mean is 1.
    assert seen == [None, [33], [33], [1], None, None]


@pytest.mark.parametrize("wrong", [[65], [-1], [1, 1]])
def test_what_the_operator_refuses_is_refused(artifact, wrong):
    with emulate.use_rules(wide=True):
        ops = harness.make("ascend")
        layer = tuning._moe_layer(artifact("kimi"), ops)
        codes, groups = torch.ones(64, 128, dtype=torch.int8), torch.zeros(24, dtype=torch.int64)
        with pytest.raises(emulate.RefusedError, match="tuning_config"):
            torch.ops.npu.npu_grouped_matmul(
                [codes], [layer.gate_up.weight], scale=[layer.gate_up.scale], bias=[layer.gate_up.scale_bias],
                per_token_scale=[torch.ones(64)], group_list=groups, group_list_type=1, group_type=0, split_item=2,
                output_dtype=torch.float32, tuning_config=wrong,
            )  # fmt: skip


def test_the_fastest_is_chosen_where_it_gains(artifact, monkeypatch):
    """With a clock of our own: told the mean, an operator of up to 16 rows is faster by a third; expanded, one of more
    than 128 rows is; all else differs by 1%."""

    def seconds(run, device, least, most):
        run()
        shape, expectation = next(iter(ops.products.tuning.chosen.items()))
        gains = {Expectation.MEAN: shape.rows <= 16, Expectation.EXPANDED: shape.rows > 128}
        return 0.66 if gains.get(expectation) else 1.0 if expectation is Expectation.NONE else 0.99

    monkeypatch.setattr(tuning, "seconds_of", seconds)
    monkeypatch.setattr(tuning, "TOKENS", (1, 2, 8, 64))  # of 6 experts each: 8, 16, 64 and 512 rows
    with emulate.use_rules(wide=True):
        ops = harness.make("ascend")
        tried = list(tuning.tune(artifact("kimi"), ops))
    assert ops.products.tuning == Tuning()
    choices = {(each.shape.inputs, each.shape.rows): each.choice.value for each in tried}
    by_rows = {8: "mean", 16: "mean", 64: "none", 512: "expanded"}
    assert choices == {(inputs, rows): choice for inputs in (128, 64) for rows, choice in by_rows.items()}
    assert all(each.as_json()["expect"] == each.choice.value for each in tried)


@pytest.mark.parametrize("fused", [True, False])
def test_gate_and_up_are_measured_only_where_a_grouped_matmul_runs_them(artifact, monkeypatch, fused):
    monkeypatch.setattr(tuning, "TOKENS", (1,))
    monkeypatch.setattr(tuning, "seconds_of", lambda *_: 1.0)
    with emulate.use_rules(wide=True):
        ops = harness.make("ascend", fused_experts=fused)
        inputs = {each.shape.inputs for each in tuning.tune(artifact("kimi"), ops)}
        assert ops.routing.fused.works is fused
    assert inputs == ({64} if fused else {64, 128})


def test_what_cannot_be_tuned_is_refused(artifact):
    with emulate.use_rules(wide=True), pytest.raises(BackendError, match="not quantized"):
        list(tuning.tune(artifact("kimi-float"), harness.make("ascend")))
    with pytest.raises(BackendError, match="only the ascend backend"):
        list(tuning.tune(artifact("kimi"), make_ops("reference")))
