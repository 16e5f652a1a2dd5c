"""The working set: what the budget promises, measured in a process of its own."""

from __future__ import annotations

from itertools import pairwise

import pytest

from npuq.convert.plan.memory import plan_budget
from npuq.convert.plan.prepare import prepare
from npuq.errors import ConversionError
from npuq.native import library as native


@pytest.fixture(scope="module")
def wide(tmp_path_factory, write):
    """A checkpoint whose head and embedding (2 × 12 M values) dwarf any small budget."""
    directory = tmp_path_factory.mktemp("wide") / "source"
    config = {"vocab_size": 48_000, "hidden_size": 256, "num_nextn_predict_layers": 0, "moe_intermediate_size": 512}
    return write(directory, shards=1, config=config)


RECIPES = {
    "float": "target: npuq\nrules: []",
    "minmax": "method: minmax\nrules: [{scheme: w8a8}]",
    # The exact search is slow in torch: a few experts suffice.
    "mse": "target: npuq\nmethod: mse\nrules: [{layers: 1, roles: routed_expert, scheme: w4a8}]",
}


@pytest.mark.parametrize("kind", list(RECIPES))
@pytest.mark.parametrize("max_memory", [8_000_000, 60_000_000])
def test_the_working_set_stays_within_max_memory(kind, max_memory, wide, rig, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPES[kind])
    answer = rig(wide, tmp_path / "out", options={"recipe": str(recipe), "max_memory": max_memory, "workers": 2})
    assert answer["summary"]["memory_bytes"] <= max_memory
    # Beside the working set: code of libraries first touched, stacks, the plan, rope tables, the allocator's slack. One
    # tensor alone, taken whole, would be 340 MB.
    assert answer["memory"] < max_memory + 40_000_000


def test_smaller_budgets_take_smaller_chunks_then_fewer_workers(v3_source, monkeypatch):
    monkeypatch.setattr(native, "library", lambda: None)  # the torch search needs the most
    prepared = prepare(v3_source, "w4a8", None, 10**9)
    prepared.checkpoint.close()
    limits = (10**10, 10**9, 10**8, 10**7, 10**6, 4 * 10**5)
    budgets = [plan_budget(prepared.plan, 8, limit) for limit in limits]
    assert all(budget.nbytes <= limit for budget, limit in zip(budgets, limits, strict=True))
    assert [budget.workers for budget in budgets] == [8, 5, 1, 1, 1, 1]
    assert all(former.nbytes > later.nbytes for former, later in pairwise(budgets))
    with pytest.raises(ConversionError, match="too small"):
        plan_budget(prepared.plan, 8, 1000)
