"""Whole generations over ranks: the tokens and logits of one process, bit by bit."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from ascend_rig import emulate, harness
from ascend_rig.ranks.chips import Chips
from ascend_rig.ranks.generation_jobs import generate

A2, A3 = Chips("A2", dispatches=False), Chips("A3")
DISPATCH = "npu_moe_distribute_dispatch_v2"


@cache
def alone(path: Path) -> harness.Run:
    with emulate.use_rules(wide=False):
        return harness.generate(path, harness.make("ascend", torch.bfloat16))


CASES = {
    "experts, all-to-all": ("example", "ep=2", A2),
    "experts, dispatch": ("prolog", "ep=2", A3),
    "experts and heads": ("prolog", "ep=2,tp=2", A3),
    "heads": ("example", "tp=2", A2),
    "four ranks": ("example", "ep=4,tp=4", A2),
    "W8A8": ("kimi-w8a8", "ep=2,tp=2", A2),
    "static W8A8": ("kimi-static", "ep=2,tp=2", A2),
    "int8 cache": ("example-int8-cache", "ep=2,tp=2", A2),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_generate_what_one_process_does(artifact, ranks, name):
    model, parallel, chips = CASES[name]
    path, size = artifact(model), int(parallel[3])
    found = ranks.run(generate, path, parallel, chips, False, {}, ranks=size)
    expected = alone(path)
    run = found[0].run
    assert run.tokens == expected.tokens
    assert len(run.logits) == len(expected.logits)
    assert all(map(torch.equal, run.logits, expected.logits))
    assert all((each.calls.get(DISPATCH, 0) > 0) == (chips is A3 and "ep" in parallel) for each in found)
