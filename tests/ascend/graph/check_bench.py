"""`npuq doctor --bench` on the emulated NPU, which it says to be one: operators, the eager step and the graph."""

from __future__ import annotations

import pytest
import torch
from ascend_rig import emulate, harness, models
from ascend_rig.graph.device import emulated, npu_graphs

from npuq.cli.measurements import bench_lines
from npuq.runtime.diagnostics.bench import decode


@pytest.fixture
def on_npu(monkeypatch):
    """Operators of the emulated NPU, with graphs, wherever the bench asks for some."""

    def make_ops(*_, **__):
        ops = harness.make("ascend", torch.bfloat16)
        ops.graphs = npu_graphs()
        return ops

    monkeypatch.setattr(decode, "make_ops", make_ops)
    monkeypatch.setattr(decode, "STEP_SECONDS", 0.01)
    with emulate.use_rules(), emulated() as device:
        yield device


@pytest.mark.parametrize("name,attention", [("kimi", "fused_infer_attention_paged"), ("v32", "sparse_flash_attention")])
def test_a_step_is_measured_eagerly_and_as_a_graph(on_npu, name, attention):
    config = {"kimi": models.KIMI, "v32": models.V32}[name]
    bench = decode.bench_random("ascend", "npu:0", 3, 40, config)
    assert bench.emulated and bench.device == "cpu"
    assert bench.eager_seconds > 0 and bench.graph_seconds is not None and bench.graph_seconds > 0
    assert sum(graph.replays for graph in on_npu.graphs) > 0
    times = {each.operator: each for each in bench.operators}
    assert {"grouped_matmul", "moe_init_routing", attention} <= set(times)
    rows = 3 * 40 if name == "kimi" else 3 * 8
    moved = 2 * (rows * (512 + 64) + 3 * 4 * (512 + 64) + 3 * 4 * 512)  # cached rows, queries of 4 heads, results
    assert moved <= times[attention].bytes < 1.02 * moved  # with lengths and tables
    text = "\n".join(bench_lines(bench))
    assert "EMULATED on the CPU" in text and "step, graph" in text and "none" not in text
