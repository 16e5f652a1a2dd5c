"""Shared experts on a second stream: what waits for what, and that a result which nobody waited for would show."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ascend_rig import emulate, harness
from torch import Tensor

from npuq.runtime.ops.ascend.side_stream import SideStream
from npuq.runtime.step import Chunk

STEP = [Chunk(range(3, 9), 0, [1]), Chunk(range(3, 7), 0, [2])]


class Streams:
    """`torch_npu.npu` with streams by name, and a log of what runs and waits where."""

    def __init__(self, capturing: bool = True) -> None:
        self.log: list[str] = []
        self.current = "main"
        self.capturing = capturing

    def Stream(self) -> Any:  # noqa: N802
        return _Stream(self, "side")

    def current_stream(self) -> Any:
        return _Stream(self, self.current)

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    @contextmanager
    def stream(self, stream: Any) -> Any:
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def __getattr__(self, name: str) -> Any:
        """An operator of `torch.ops.npu`, noted."""
        original = getattr(torch.ops.npu, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.log.append(f"{self.current}: {name}")
            return original(*args, **kwargs)

        return call


class _Stream:
    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name

    def wait_stream(self, other: Any) -> None:
        self.streams.log.append(f"{self.name} waits for {other.name}")


class Unfinished(SideStream):
    """A stream whose results are NaN until it is joined."""

    def run(self, work: Any) -> Tensor:
        self.result = super().run(work)
        self.kept = self.result.clone()
        return self.result.fill_(float("nan"))

    def join(self) -> None:
        super().join()
        self.result.copy_(self.kept)


def logits(path: Any, streams: Streams, side: SideStream | None) -> Tensor:
    ops = harness.make("ascend", torch.bfloat16)
    engine = harness.load(path, ops).engine
    ops.npu.operators, ops.npu.side = streams, side
    streams.log.clear()
    return engine._run(STEP)[0].float()


def test_the_shared_experts_run_beside_the_routed_ones(artifact):
    path, streams = artifact("prolog"), Streams()
    with emulate.use_rules():
        ours = logits(path, streams, Unfinished(streams))
        log = list(streams.log)
        plain = logits(path, Streams(), None)
    assert torch.equal(ours, plain)
    first = log.index("side waits for main")
    layer = log[first : log.index("main: npu_moe_finalize_routing", first) + 1]
    beside = ["npu_dynamic_quant", "npu_quant_matmul", "npu_dequant_swiglu_quant", "npu_quant_matmul"]
    assert [entry for entry in layer if entry.startswith("side: ")] == [f"side: {name}" for name in beside]
    assert layer[-2:] == ["main waits for side", "main: npu_moe_finalize_routing"]
    assert sum(entry.startswith("main: ") for entry in layer) == 5  # gate, routing in, two matmuls, routing out
    assert log.count("side waits for main") == log.count("main waits for side") == 2  # of the two layers with experts


def test_an_eager_step_has_one_stream(artifact):
    streams = Streams(capturing=False)
    logits(artifact("prolog"), streams, Unfinished(streams))
    assert not [entry for entry in streams.log if entry.startswith("side")]


def test_a_result_that_nobody_waited_for_shows(artifact):
    class Forgetful(Unfinished):
        def join(self) -> None:
            pass

    streams = Streams()
    assert logits(artifact("prolog"), streams, Forgetful(streams)).isnan().any()


@pytest.mark.parametrize("name", ["kimi-static", "example-float"])
def test_other_schemes_agree_too(artifact, name):
    streams = Streams()
    assert torch.equal(logits(artifact(name), streams, Unfinished(streams)), logits(artifact(name), Streams(), None))
    assert "main waits for side" in streams.log
