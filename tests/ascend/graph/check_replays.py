"""Captured decode steps: replays with other tokens, lengths and padding give what eager steps give."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ascend_rig import emulate, harness
from ascend_rig.graph.device import Device, emulated, npu_graphs
from torch import Tensor

from npuq.runtime.engine import Engine
from npuq.runtime.graph import decode
from npuq.runtime.step import Chunk

SEQUENCES = 8
# Prompts of these lengths, and then the sequences (by number) that each decode step has: 5 of them are padded to 6, 7
# to 8, and a sequence pauses or leaves now and then.
LENGTHS = (3, 20, 33, 7, 16, 15, 1 + 16, 5)
STEPS = ((0, 1, 2, 3, 4), (4, 1, 0), (0, 1, 2, 3, 4, 5, 6), (7,), (6, 5, 4, 3, 2, 1, 0), (2, 0, 1, 4, 5, 3), (2,))

MODELS = ("example", "v2-lite", "glm-flash", "kimi-static", "example-int8-cache", "v32", "glm-dsa", "qwen3", "glm4")
# In bfloat16, which the fused prolog needs: fewer captures of larger models.
SIZES_IN_BF16, STEPS_IN_BF16 = (2, 6), ((0, 1, 2, 3, 4), (4, 1, 0), (2,))
IN_BF16 = ("prolog", "prolog-int8-cache", "glm-dsa-prolog")


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated() as device:
        yield device


def engine_of(path: Path, dtype: torch.dtype, graphs: bool) -> Engine:
    """An engine for eight sequences, its cache full of NaN."""
    ops = harness.make("ascend", dtype)
    if graphs:
        ops.graphs = npu_graphs()
    with pytest.MonkeyPatch.context() as patched:
        for settings in (harness.ENGINE, harness.INT8_ENGINE):
            patched.setitem(settings, "max_num_seqs", SEQUENCES)
        patched.setattr(harness, "CACHE_BLOCKS", 4 * SEQUENCES)
        patched.setattr(harness, "INT8_BLOCKS", SEQUENCES)
        return harness.load(path, ops).engine


class Replayed:
    """Sequences that decode in one engine: `step` feeds each a token that depends on its number and length."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self.lengths = list(LENGTHS)
        each = engine.blocks.num_blocks // SEQUENCES
        self.blocks = [range(each * index, each * (index + 1)) for index in range(SEQUENCES)]
        for index, length in enumerate(LENGTHS):
            engine._run([Chunk([3 + (7 * index + i) % 300 for i in range(length)], 0, self.blocks[index])])

    def chunks(self, which: tuple[int, ...]) -> list[Chunk]:
        made = [Chunk([5 + 31 * i + 3 * self.lengths[i]], self.lengths[i], self.blocks[i]) for i in which]
        for index in which:
            self.lengths[index] += 1
        return made


def padded(chunks: list[Chunk], size: int, block: int) -> list[Chunk]:
    """The chunks as a captured step has them."""
    return [*chunks, *[Chunk([0], 0, [block], absorbed=True)] * (size - len(chunks))]


def rows_in_cache(engine: Engine) -> list[Tensor]:
    """All blocks that sequences own."""
    return [pages.tensor[: engine.blocks.num_blocks] for layer in engine.cache for pages in layer.pages.values()]


def run_both(
    path: Path, device: Device, dtype: torch.dtype, steps: Sequence[tuple[int, ...]]
) -> tuple[Engine, list[tuple[Tensor, ...]]]:
    """All steps, eagerly in one engine and replayed in another: (replayed, eager and padded, eager) for each."""
    replayed, eager = (Replayed(engine_of(path, dtype, graphs)) for graphs in (True, False))
    graphs = replayed.engine.graphs
    assert graphs is not None and graphs.active
    results = []
    for which in steps:
        before = sum(graph.replays for graph in device.graphs)
        ours = replayed.engine._run(replayed.chunks(which))[0].clone()
        device.synchronize()
        assert sum(graph.replays for graph in device.graphs) == before + 1
        chunks = eager.chunks(which)
        unpadded = eager.engine.run_eagerly(chunks)[0]
        # Last: what it writes into the cache stays, to the last bit what the replay has written.
        size = next(size for size in graphs.sizes if size >= len(which))
        theirs = eager.engine.run_eagerly(padded(chunks, size, eager.engine.blocks.num_blocks))[0][: len(which)]
        results.append((ours, theirs, unpadded))
        # Unwritten rows are NaN in both: padding has written no block of a sequence.
        for one, other in zip(*map(rows_in_cache, (replayed.engine, eager.engine)), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    return replayed.engine, results


def check(results: list[tuple[Tensor, ...]], tolerance: float) -> None:
    for ours, theirs, unpadded in results:
        assert torch.equal(ours, theirs)  # the same operators on as many rows
        assert harness.relative_error([ours.float()], [unpadded.float()]) < tolerance


@pytest.mark.parametrize("name", MODELS)
def test_replays_equal_eager_steps(artifact, device, name):
    with emulate.use_rules(wide=True):
        engine, results = run_both(artifact(name), device, torch.float32, STEPS)
        check(results, 1e-4)
    assert engine.graphs.sizes == (1, 2, 3, 4, 6, 8)
    for graph, captured in zip(device.graphs, engine.graphs._captured.values(), strict=True):
        graph.check_nothing_left(captured.graph.output)
    if name == "v32":  # a selection has 8 tokens: the step of sequence 7 alone is below it
        of_a_size = [graph.replays for graph in device.graphs]
        assert sum(of_a_size[0::2]) == 1 and sum(of_a_size[1::2]) == len(STEPS) - 1


@pytest.mark.parametrize("name", IN_BF16)
def test_replays_in_bf16_equal_eager_steps(artifact, device, name, monkeypatch):
    monkeypatch.setattr(decode, "graph_sizes", lambda _: SIZES_IN_BF16)
    with emulate.use_rules():
        check(run_both(artifact(name), device, torch.bfloat16, STEPS_IN_BF16)[1], 0.05)


def test_a_replay_waits_for_the_end_of_the_last_one(artifact, device):
    """Steps back to back, whose logits nobody reads, on a device slower than the host."""
    with emulate.use_rules(wide=True):
        replayed = Replayed(engine_of(artifact("example"), torch.float32, graphs=True))
        chunks = replayed.chunks((0, 1, 2))
        wanted = replayed.engine.graphs.run(chunks).clone()
        device.lags = True
        for _ in range(3):
            found = replayed.engine.graphs.run(chunks)
        device.synchronize()
        assert torch.equal(found, wanted)


def test_prefill_runs_eagerly_and_so_does_a_step_of_too_many(artifact, device):
    with emulate.use_rules(wide=True):
        engine = engine_of(artifact("example"), torch.float32, graphs=True)
        engine._run([Chunk(range(3, 13), 0, [0]), Chunk(range(3, 13), 0, [1])])
        beside = [Chunk([5], 10, [0]), Chunk(range(3, 9), 10, [1])]
        assert engine.graphs.run(beside) is None
        assert engine.graphs.run([Chunk([5], 10, [0], last_row=False)]) is None
        assert engine.graphs.run([Chunk([5], 0, [0])]) is None
        assert engine.graphs.run([Chunk([5], 10, [0])] * 9) is None
    assert sum(graph.replays for graph in device.graphs) == 0


def test_a_generation_is_the_same_with_graphs(artifact, device):
    """Through scheduler and sampler, with sequences that wait for blocks."""
    path = artifact("example")
    with emulate.use_rules(wide=True):
        eager = harness.generate(path, harness.make("ascend"))
        ops = harness.make("ascend")
        ops.graphs = npu_graphs()
        assert harness.generate(path, ops).tokens == eager.tokens
    assert sum(graph.replays for graph in device.graphs) >= 4


@pytest.mark.parametrize("several_ranks", [False, True])
def test_ranks_capture_nothing_and_eager_is_a_choice(artifact, device, several_ranks):
    ops = harness.make("ascend")
    ops.graphs = npu_graphs()
    with emulate.use_rules(wide=True):
        engine = harness.load(artifact("example"), ops, graphs=False).engine
    assert engine.graphs is None and device.graphs == []
    ops.group = SimpleNamespace(size=1 + several_ranks)
    with emulate.use_rules(wide=True):
        assert (engine._capture() is None) == several_ranks
