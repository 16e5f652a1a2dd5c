"""What a captured step must not do is noticed: memory that is not kept, lengths of another step, reads by the host."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ascend_rig import emulate, harness
from ascend_rig.graph.device import Device, Graph, emulated, npu_graphs
from ascend_rig.graph.recording import GraphError
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch_npu.npu import graphs as torch_graphs

from npuq.errors import NpuqWarning
from npuq.runtime.engine import Engine
from npuq.runtime.graph import decode
from npuq.runtime.ops.ascend.graph import capture
from npuq.runtime.ops.ascend.graph.capture import NpuGraph
from npuq.runtime.step import Chunk, Inputs, StepBuilder

PROMPTS = ([5, 9, 31, 7, 44, 8, 3, 21, 17, 60], [12, 40, 6, 90, 33, 70, 55, 19, 28, 64, 81])
DECODES = ([Chunk([50], 10, [0]), Chunk([61], 11, [1])], [Chunk([44], 12, [1]), Chunk([52], 11, [0])])


@pytest.fixture
def device() -> Iterator[Device]:
    with emulate.use_rules(wide=True), emulated() as device:
        yield device


def engine_of(path: Path, graphs: bool, prepare: Callable[[Any], None] = lambda _: None) -> Engine:
    """An engine for two sequences. prepare: changes its set of operators."""
    ops = harness.make("ascend")
    if graphs:
        ops.graphs = npu_graphs()
    prepare(ops)
    return harness.load(path, ops).engine


def decode_steps(engine: Engine) -> list[Tensor]:
    """Logits of two decode steps after a prefill."""
    for block, prompt in enumerate(PROMPTS):
        engine._run([Chunk(prompt, 0, [block])])
    return [engine._run(chunks)[0].clone() for chunks in DECODES]


def differs(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return harness.relative_error(ours, theirs) > 1e-3


@pytest.fixture
def right(artifact) -> Callable[[str], list[Tensor]]:
    return lambda name: decode_steps(engine_of(artifact(name), graphs=False))


def test_without_a_mutation_nothing_shows(artifact, device, right):
    with warnings.catch_warnings():
        warnings.simplefilter("error", NpuqWarning)
        for name in ("example", "v32"):
            assert not differs(decode_steps(engine_of(artifact(name), graphs=True)), right(name))


INPUTS = ("token_ids", "positions", "slots", "block_table", "device_lens")


def with_a_copy(inputs: Inputs, field: str) -> Inputs:
    """The inputs, one of them in memory that no later step overwrites."""
    if field in ("block_table", "device_lens"):
        assert inputs.decode is not None
        changed = getattr(inputs.decode, field)
        copied = None if changed is None else changed.clone()
        return replace(inputs, decode=replace(inputs.decode, **{field: copied}))
    return replace(inputs, **{field: getattr(inputs, field).clone()})


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("field", INPUTS)
def test_an_input_that_is_not_persistent_shows(artifact, device, right, monkeypatch, field, kept):
    """Kept, it has the content of the capture; freed, the device reads anything, which the emulation refuses."""
    original = StepBuilder.to_device

    def to_device(self: StepBuilder, on_host: Inputs, into: Tensor | None = None) -> Inputs:
        made = original(self, on_host, into)
        return made if into is None else with_a_copy(made, field)

    monkeypatch.setattr(StepBuilder, "to_device", to_device)
    if not kept:
        made = decode._Captured
        monkeypatch.setattr(decode, "_Captured", lambda graph, _, buffer: made(graph, None, buffer))
    name = "v32" if field == "device_lens" else "example"
    engine = engine_of(artifact(name), graphs=True)
    if kept:
        assert differs(decode_steps(engine), right(name))
    else:
        with pytest.warns(NpuqWarning, match="memory that was freed"):
            assert not differs(decode_steps(engine), right(name))
        assert not engine.graphs.active


def test_a_buffer_that_is_not_kept_shows(artifact, device, monkeypatch):
    made = decode._Captured
    monkeypatch.setattr(decode, "_Captured", lambda graph, _, buffer: made(graph, None, torch.zeros_like(buffer)))
    engine = engine_of(artifact("example"), graphs=True)
    with pytest.warns(NpuqWarning, match="memory that was freed"):
        decode_steps(engine)


def test_rope_rows_gathered_before_the_capture_show(artifact, device, right, monkeypatch):
    original, made = StepBuilder.step, {}

    def once(self: StepBuilder, inputs: Inputs) -> Any:
        place = inputs.positions.data_ptr()
        if place not in made:
            made[place] = original(self, inputs)
        return made[place]

    monkeypatch.setattr(StepBuilder, "step", once)
    assert differs(decode_steps(engine_of(artifact("example"), graphs=True)), right("example"))


@pytest.mark.parametrize("name", ["example", "example-int8-cache"])
def test_lengths_of_another_step_show(artifact, device, right, monkeypatch, name):
    replay = NpuGraph.replay
    monkeypatch.setattr(NpuGraph, "replay", lambda self, kv_lens: replay(self, [1] * len(kv_lens)))
    assert differs(decode_steps(engine_of(artifact(name), graphs=True)), right(name))


@pytest.mark.parametrize("name", ["example", "example-int8-cache"])
def test_lengths_under_another_name_show(artifact, device, right, monkeypatch, name):
    monkeypatch.setattr(capture, "KV_LENGTHS", ("actual_seq_lengths", "actual_seq_qlen_kv"))
    engine = engine_of(artifact(name), graphs=True)
    with warnings.catch_warnings():  # the lengths of the queries are refused where they are not theirs
        warnings.simplefilter("ignore", NpuqWarning)
        logits = decode_steps(engine)
    assert not engine.graphs.active or differs(logits, right(name))


def test_a_replay_without_an_update_hangs(artifact, device, monkeypatch):

    def replay(self: NpuGraph, kv_lens: list[int]) -> None:
        with self._npu.device(self._device):
            self._graph.replay()

    monkeypatch.setattr(NpuGraph, "replay", replay)
    engine = engine_of(artifact("example"), graphs=True)
    engine._run(DECODES[0])
    with pytest.raises(GraphError, match="waits for an event"):
        device.synchronize()
    device.running = None


READS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "numpy": lambda x: x.numpy(),
    "a mask": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "host data": lambda x: x + torch.tensor([1.0]),
}


@pytest.mark.parametrize("read", READS)
def test_a_read_by_the_host_ends_the_capture(artifact, device, right, read):
    """And the step goes on eagerly, which is said once."""

    def prepare(ops: Any) -> None:
        rms_norm = ops.norms.rms_norm

        def reading(x: Tensor, *args: Any) -> Tensor:
            READS[read](x)
            return rms_norm(x, *args)

        ops.norms.rms_norm = reading

    with pytest.warns(NpuqWarning, match="cannot be captured as a graph and runs eagerly") as said:
        engine = engine_of(artifact("example"), graphs=True, prepare=prepare)
        assert not differs(decode_steps(engine), right("example"))
    assert len(said) == 1 and not engine.graphs.active


def test_a_capture_that_cannot_be_ended_leaves_nothing_in_place(artifact, device, right, monkeypatch):
    """On a device, the end of an invalid capture raises too. torch_npu's mode would put eager attention into groups."""
    end = Graph.capture_end

    def failing(self: Graph) -> None:
        end(self)
        raise RuntimeError("the stream's capture is invalidated")

    monkeypatch.setattr(Graph, "capture_end", failing)
    with pytest.warns(NpuqWarning, match="cannot be captured as a graph and runs eagerly: .* invalidated"):
        engine = engine_of(artifact("example"), graphs=True)
    assert not differs(decode_steps(engine), right("example"))
    assert _get_current_dispatch_mode_stack() == []


def test_an_allocation_that_outlives_the_capture_shows(artifact, device):
    kept: list[Tensor] = []

    def prepare(ops: Any) -> None:
        swiglu = ops.norms.dequant_swiglu_quant
        ops.norms.dequant_swiglu_quant = lambda x: kept.append(x) or swiglu(x)

    engine = engine_of(artifact("example"), graphs=True, prepare=prepare)
    outputs = [captured.graph.output for captured in engine.graphs._captured.values()]
    with pytest.raises(GraphError, match="outlive the capture"):
        device.graphs[0].check_nothing_left(*outputs)


def test_a_result_of_another_graph_is_garbage(artifact, device):
    """The graphs of a pool share memory: the emulation spoils it, so that nobody relies on it."""
    engine = engine_of(artifact("example"), graphs=True)
    decode_steps(engine)
    first = engine.graphs._captured[2, False].graph
    assert first.output.isfinite().all()
    device.graphs[0].recorder.memory.spoil()
    assert first.output.isnan().all()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_failed_update_leaves_nothing_waiting(artifact, device, right, monkeypatch, after):
    """The step runs again, eagerly: its tokens are in the cache once, and the next step finds them."""
    begin, calls = torch_graphs._graph_task_update_begin, []

    def failing(*args: Any) -> None:
        calls.append(args)
        if len(calls) == after + 1:
            raise RuntimeError("aclrtTaskUpdate failed\nerror code 507000")
        begin(*args)

    engine = engine_of(artifact("example"), graphs=True)
    monkeypatch.setattr(torch_graphs, "_graph_task_update_begin", failing)
    with pytest.warns(NpuqWarning, match="cannot be replayed .* aclrtTaskUpdate failed error code 507000") as said:
        logits = decode_steps(engine)
    device.synchronize()
    assert not differs(logits, right("example"))
    assert len(said) == 1 and not engine.graphs.active


def test_an_interrupted_update_can_be_followed_by_others(artifact, device, right, monkeypatch):
    begin, calls = torch_graphs._graph_task_update_begin, []

    def interrupted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        begin(*args)

    engine = engine_of(artifact("example"), graphs=True)
    monkeypatch.setattr(torch_graphs, "_graph_task_update_begin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        decode_steps(engine)
    device.synchronize()
    assert not differs(decode_steps(engine), right("example"))
    assert engine.graphs.active and sum(graph.replays for graph in device.graphs) == 3


def test_the_padding_needs_its_own_block(artifact, device, right, monkeypatch):
    """Padding in the block of a sequence is noticed: five sequences in a graph of six."""
    monkeypatch.setitem(harness.ENGINE, "max_num_seqs", 7)

    def run(broken: bool) -> Tensor:
        engine = engine_of(artifact("example"), graphs=True)
        for block, prompt in enumerate((*PROMPTS, PROMPTS[0], PROMPTS[1], PROMPTS[0])):
            engine._run([Chunk(prompt, 0, [block])])
        if broken:
            monkeypatch.setattr(engine.graphs, "_spare_block", 0)
        chunks = [Chunk([50 + block], 10 + block % 2, [block]) for block in range(5)]
        engine._run(chunks)
        return engine._run([Chunk([9], 11, [0])])[0].clone()

    assert differs([run(broken=True)], [run(broken=False)])
