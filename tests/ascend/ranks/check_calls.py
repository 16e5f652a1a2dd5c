"""The listing of schemas against the calls that ranks make."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ascend_rig.ranks.chips import Chips
from ascend_rig.ranks.jobs import Layer, record_layer

CALLS = json.loads((Path(__file__).parent.parent / "schemas.json").read_text())["calls"]


@pytest.mark.parametrize("chips", [Chips("A2"), Chips("A3"), Chips("A2", dispatches=False)], ids=str)
def test_the_listing_has_every_call_of_ranks(ranks, chips):
    for calls in ranks.run(record_layer, Layer(chips=chips)):
        assert {name for name in calls if "distribute" in name} == (
            {"npu_moe_distribute_combine_v2", "npu_moe_distribute_dispatch_v2"} if chips.dispatches else set()
        )
        for name, call in calls.items():
            listed = CALLS[name]
            assert call["positional"] <= listed["positional"], name
            assert set(call["arguments"]) <= set(listed["arguments"]), name
            assert set(call["none"]) <= set(listed["none"]), name
