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
    "experts, all-to-all": ("example", 2, "ep=2", A2),
    "experts, dispatch": ("prolog", 2, "ep=2", A3),
    "experts, and heads in the prolog": ("prolog", 2, "ep=2,tp=2", A3),
    "four ranks": ("example", 4, "ep=4,tp=4", A2),
    "groups of two of four": ("example", 4, "ep=4,tp=2", A2),
    "ten heads a rank, which sixteen stand for": ("glm-flash", 2, "ep=2,tp=2", A2),
    "no latent of queries": ("v2-lite", 2, "ep=2,tp=2", A2),
    "float": ("example-float", 2, "ep=2,tp=2", A2),
    "W8A8": ("kimi-w8a8", 2, "ep=2,tp=2", A2),
    "static W8A8": ("kimi-static", 2, "tp=2", A2),
    "int8 cache": ("example-int8-cache", 2, "ep=2,tp=2", A2),
    "sparse": ("v32-prolog", 2, "ep=2,tp=2", A3),
    "grouped-query": ("glm4", 2, "ep=2,tp=2", A2),
    "key heads that two ranks repeat": ("qwen3", 4, "tp=4", A2),
}


@pytest.mark.parametrize("name", CASES)
def test_ranks_generate_what_one_process_does(artifact, ranks, name):
    model, size, parallel, chips = CASES[name]
    path = artifact(model)
    found = ranks.run(generate, path, parallel, chips, ranks=size)
    expected = alone(path)
    run = found[0].run
    assert run.tokens == expected.tokens
    assert len(run.logits) == len(expected.logits)
    assert all(map(torch.equal, run.logits, expected.logits))
    assert all((each.calls.get(DISPATCH, 0) > 0) == (chips is A3) for each in found)
