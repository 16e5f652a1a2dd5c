"""How many operators a decoder layer launches, by kind; docs/ascend.md shows the same table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from ascend_rig import emulate, guard, harness

from npuq.runtime.step import Chunk

TABLE = Path(__file__).parent / "launches.json"
FIRST_LAYER = 0
MOE_LAYER = 1  # between a dense layer and another MoE layer, so that both ends are as in a deep model
SHARED_LAYER = 2  # in GLM-5, likewise


def launches_of_layer(path: Path, chunks: list[Chunk], layer: int = MOE_LAYER, **options) -> list[guard.Launch]:
    """What one MoE layer launches in the step of `chunks`, from its attention norm to the next layer's."""
    ops = harness.make("ascend", torch.bfloat16, **options)
    engine = harness.load(path, ops).engine
    starts = []
    norm = engine.model.attention.norm

    def noting(*args):
        starts.append(len(watched.launches))
        return norm(*args)

    warm = [Chunk(range(3, 3 + chunk.start), 0, chunk.blocks) for chunk in chunks if chunk.start]
    if warm:
        engine._run(warm)
    step, _ = engine._builder.build(chunks)
    attention = mock.Mock(wraps=engine.model.attention, norm=noting)
    with mock.patch.object(engine.model, "attention", attention), guard.watch() as watched:
        engine.model.forward(step, engine._cache)
    return watched.launches[starts[layer] : starts[layer + 1]]


SPARSE = [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])]  # a query attends to 8 tokens
CASES = {
    "decode, unfused": ("kimi", [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])], {"fused_prolog": False}),
    "decode, static W8A8": ("kimi-static", [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])], {}),
    "decode, fused prolog": ("prolog", [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])], {}),
    "decode, int8 cache": ("prolog-int8-cache", [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])], {}),
    "decode, no q_lora": ("v2-lite", [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])], {}),
    "decode, 20 heads of 256": ("glm-flash", [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])], {}),
    "decode, dense layer": ("prolog", [Chunk([5], 7, [1]), Chunk([6], 20, [2, 3])], {"layer": FIRST_LAYER}),
    "first prefill chunk": ("kimi", [Chunk(range(3, 23), 0, [1, 2])], {"fused_prolog": False}),
    "later prefill chunk": ("kimi", [Chunk(range(3, 23), 16, [1, 2, 3])], {"fused_prolog": False}),
    "later chunks of two sequences": (
        "kimi",
        [Chunk(range(3, 13), 16, [1, 2]), Chunk(range(3, 13), 7, [3, 4])],
        {"fused_prolog": False},
    ),
    "first chunk, 20 heads of 256": ("glm-flash", [Chunk(range(3, 23), 0, [1, 2])], {}),
    "sparse, unfused": ("v32", SPARSE, {"fused_prolog": False}),
    "sparse, fused prolog": ("v32-prolog", SPARSE, {}),
    "sparse, shared selection": ("glm-dsa-prolog", SPARSE, {"layer": SHARED_LAYER}),
    "grouped-query": ("qwen3", SPARSE, {}),
    "grouped-query, partial rotation and biases": ("glm4", SPARSE, {}),
    "grouped-query, first prefill chunk": ("qwen3", [Chunk(range(3, 23), 0, [1, 2])], {}),
    "grouped-query, later prefill chunk": ("qwen3", [Chunk(range(3, 23), 16, [1, 2, 3])], {}),
    "below the limit": ("v32-prolog", [Chunk([5], 7, [1]), Chunk([6], 5, [2])], {}),
}
LIMITS = {"decode, unfused": 27, "decode, fused prolog": 19, "decode, int8 cache": 19}


def measure(case: str, artifact) -> dict[str, object]:
    name, chunks, options = CASES[case]
    launches = launches_of_layer(artifact(name), chunks, **options)
    counts = dict(sorted(Counter(launch.name for launch in launches).items()))
    strided = sum(launch.strided > 0 for launch in launches)
    return {"total": len(launches), "with strided inputs": strided, "launches": counts}


def test_launches_are_those_of_the_table(artifact):
    measured = {case: measure(case, artifact) for case in CASES}
    print(f"\n{json.dumps(measured, indent=2)}")
    assert {case: measured[case]["total"] <= limit for case, limit in LIMITS.items()} == dict.fromkeys(LIMITS, True)
    assert measured == json.loads(TABLE.read_text())


def test_a_sequence_of_one_layer_more_costs_exactly_one_layer_more(artifact):
    """The count between two norms is the layer's whole cost: nothing hides before the first layer or after the last."""
    name, chunks, options = CASES["decode, unfused"]
    ops = harness.make("ascend", torch.bfloat16, **options)
    engine = harness.load(artifact(name), ops).engine
    engine._run([Chunk(range(3, 3 + chunk.start), 0, chunk.blocks) for chunk in chunks])
    step, _ = engine._builder.build(chunks)
    totals = []
    layers = engine.model.weights.layers
    for kept in (layers[:2], layers):
        weights = replace(engine.model.weights, layers=kept)
        with mock.patch.object(engine.model, "weights", weights), guard.watch() as watched:
            engine.model.forward(step, engine._cache[: len(kept)])
        totals.append(len(watched.launches))
    assert totals[1] - totals[0] == json.loads(TABLE.read_text())["decode, unfused"]["total"]


def test_rules_are_back_to_normal():
    assert emulate.rules.wide is False
