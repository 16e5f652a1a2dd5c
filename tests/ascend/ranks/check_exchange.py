"""Experts divided among ranks: every exchange gives what one process gives, bit by bit; wrong calls do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ascend_rig.ranks import mutations, pool
from ascend_rig.ranks.chips import Chips
from ascend_rig.ranks.jobs import Layer, Outcome, run_layer
from ascend_rig.ranks.semantics_jobs import Limit, dispatch, exchange

from npuq.formats.schemes import Scheme

DISPATCH, SCATTER, SUM = "dispatch and combine", "all-to-all", "all-reduce"
ALONG = Chips("A3", dispatches=False)  # rows go along by collectives


@pytest.mark.parametrize(("quantized", "sums"), [(False, False), (False, True), (True, False)])
def test_dispatch_and_combine_are_what_numpy_says(ranks, quantized, sums):
    ranks.run(exchange, quantized, sums, ranks=4)


LIMITS: dict[str, tuple[Limit, str]] = {
    "channels on A3": (Limit(hidden=512), "512 channels on A3"),
    "more channels on A3": (Limit(hidden=8320), "8320 channels on A3"),
    "rows on A3": (Limit(rows=513), "513 tokens on A3"),
    "channels on A2": (Limit("A2", hidden=7200), "7200 channels on A2"),
    "channels of a half block on A2": (Limit("A2", hidden=48), "48 channels on A2"),
    "rows on A2": (Limit("A2", rows=257, hidden=64), "257 tokens on A2"),
    "rows at all": (Limit(rows=0), "0 tokens on A3"),
    "experts a token": (Limit(experts=32, k=17), "17 experts a token"),
    "experts": (Limit(experts=1026), "1026 experts on 2 ranks"),
    "experts that ranks do not divide": (Limit(experts=7), "7 experts on 2 ranks"),
    "an expert twice": (Limit(k=2, same_expert=True), "an expert twice"),
    "x in float32": (Limit(x=torch.float32), "x is torch.float32"),
    "a buffer on A3": (Limit(rows=512, buffer=20), "bytes is needed"),
    "a buffer on A2": (Limit("A2", rows=256, hidden=7168, buffer=17), "bytes is needed"),
    "static quantization": (Limit(options=(("quant_mode", 1),)), "quant_mode 1"),
    "pairs of expert and number": (Limit(options=(("expert_token_nums_type", 2),)), "expert_token_nums_type"),
    "uneven rows without a batch": (Limit(uneven=True), "global_bs 0 for up to 5 tokens on 2 ranks"),
    "uneven rows and a mask": (
        Limit(uneven=True, options=(("global_bs", 10), ("x_active_mask", "short"))),
        "leaves tokens out where the ranks have different numbers",
    ),
    "expert scales on A3": (Limit(options=(("expert_scales", torch.ones(4, 1)),)), "A3 takes no expert_scales"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_the_emulation_refuses_what_the_documentation_does(ranks, name):
    limit, words = LIMITS[name]
    with pytest.raises(pool.JobError) as refused:
        ranks.run(dispatch, limit)
    assert all(line is not None and words in line for line in refused.value.said), refused.value.said


def test_the_documentation_allows_uneven_rows_with_their_batch(ranks):
    ranks.run(dispatch, Limit(uneven=True, options=(("global_bs", 10),)))


def outcomes(ranks: pool.Pool, layer: Layer, size: int = 2) -> list[Outcome]:
    found: list[Outcome] = ranks.run(run_layer, layer, ranks=size)
    return found


LAYERS = {
    "A3, tokens that ranks do not divide": (Layer(), DISPATCH),
    "A3, all-to-all": (Layer(chips=ALONG), SCATTER),
    "A3, fewer tokens than ranks": (Layer(tokens=1), DISPATCH),
    "A3, fewer tokens than ranks, all-reduce": (Layer(tokens=1, chips=ALONG), SUM),
    "A3, too many tokens": (Layer(tokens=300), SCATTER),
    "A3, a small buffer": (Layer(chips=Chips("A3", buffer=2)), SCATTER),
    "A3, few channels": (Layer(hidden=512), SCATTER),
    "A2, as engines choose": (Layer(chips=Chips("A2", dispatches=False), hidden=128), SCATTER),
    "A2, as documented": (Layer(chips=Chips("A2"), hidden=128), DISPATCH),
    "W8A8": (Layer(Scheme.W8A8), DISPATCH),
    "W8A8, all-to-all": (Layer(Scheme.W8A8, chips=ALONG), SCATTER),
    "FLOAT": (Layer(Scheme.FLOAT), DISPATCH),
    "FLOAT, all-to-all": (Layer(Scheme.FLOAT, chips=ALONG), SCATTER),
    "a rank without rows": (Layer(experts_of=(0, 1, 2, 3)), DISPATCH),
    "a rank without rows, all-to-all": (Layer(experts_of=(0, 1, 2, 3), chips=ALONG), SCATTER),
    "a rank without rows, all-reduce": (Layer(experts_of=(0, 1, 2, 3), tokens=1, chips=ALONG), SUM),
}


@pytest.mark.parametrize("name", LAYERS)
def test_ranks_give_what_one_process_gives(ranks, name):
    layer, exchange = LAYERS[name]
    found = outcomes(ranks, layer)
    assert [each.exchange for each in found] == [exchange] * 2
    assert all(each.equal for each in found)
    assert sum(each.rows for each in found) == layer.tokens * layer.k, "a row is computed once"


@pytest.mark.parametrize("dispatches", [True, False])
def test_three_ranks(ranks, dispatches):
    found = outcomes(ranks, Layer(experts=12, chips=Chips("A3", dispatches)), size=3)
    assert all(each.equal for each in found)


@pytest.mark.parametrize("name", [*mutations.ALL_RANKS, *mutations.RANGE_ON_ONE_RANK])
def test_a_wrong_range_does_not_pass(ranks, name):
    assert outcome(ranks, Layer(chips=ALONG, mutation=name)) != "unnoticed"


@pytest.mark.parametrize("name", [*mutations.DISPATCH_ONLY, *mutations.ONE_RANK])
def test_a_wrong_dispatch_does_not_pass(ranks, name):
    assert outcome(ranks, Layer(mutation=name)) != "unnoticed"


@pytest.mark.parametrize("name", mutations.A2_ONLY)
def test_a_wrong_dispatch_on_a2_does_not_pass(ranks, name):
    assert outcome(ranks, Layer(chips=Chips("A2"), hidden=128, mutation=name)).startswith("refused")


def outcome(ranks: pool.Pool, layer: Layer) -> str:
    """ "refused: …", "shows" or "unnoticed". All ranks must refuse together, so that none waits for another."""
    try:
        found = outcomes(ranks, layer)
    except pool.JobError as error:
        print(f"{layer.mutation}: {error}")
        assert all(error.said), "a rank went on alone"
        return f"refused: {error}"
    rows = sum(each.rows for each in found)
    shows = not all(each.equal for each in found) or rows != layer.tokens * layer.k
    return "shows" if shows else "unnoticed"


def test_the_method_finds_nothing_where_nothing_is_wrong(ranks):
    assert outcome(ranks, replace(Layer(), mutation="")) == "unnoticed"
