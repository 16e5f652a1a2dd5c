"""The loop for a server: a thread that steps for all, requests added and dropped from elsewhere without waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from npuq.errors import GenerationError
from npuq.runtime import LanguageModel, SamplingParams
from npuq.runtime.engine import Engine, StepOutput
from npuq.runtime.loop import Loop
from npuq.runtime.request import Request
from npuq.runtime.sequence import Sequence

GO = SamplingParams(max_new_tokens=12, ignore_eos=True)
PROMPTS = [[9, 9], [5, 6, 7], [40, 41, 42, 43]]
WAIT = 60.0
"""Seconds until a test gives up: other work may have the cores."""


class Receiver:
    """A client that keeps what it is told."""

    def __init__(self) -> None:
        self.sequences: tuple[Sequence, ...] = ()
        self.tokens: dict[Sequence, list[int]] = {}
        self.error: GenerationError | None = None
        self.changed = threading.Condition()

    def expect(self, sequences: tuple[Sequence, ...]) -> None:
        self.sequences = sequences
        self.tokens = {sequence: [] for sequence in sequences}

    def is_ready(self) -> bool:
        return False

    def receive(self, output: StepOutput) -> bool:
        assert output.token is not None
        with self.changed:
            self.tokens[output.sequence].append(output.token)
            self.changed.notify_all()
        return False

    def fail(self, error: GenerationError) -> None:
        with self.changed:
            self.error = error
            self.changed.notify_all()

    def wait_for(self, count: int) -> list[list[int]]:
        """The tokens of each sequence, once each has so many."""
        with self.changed:
            enough = self.changed.wait_for(
                lambda: self.error is not None or all(len(some) >= count for some in self.tokens.values()), WAIT
            )
        assert enough
        assert self.error is None
        return list(self.tokens.values())


@pytest.fixture
def loop(example: LanguageModel) -> Iterator[Loop]:
    """The example's loop, with a thread that runs it."""
    loop, stopped = example.loop, threading.Event()
    thread = threading.Thread(target=loop.run, args=(stopped.is_set,), daemon=True)
    thread.start()
    yield loop
    stopped.set()
    loop.wake()
    thread.join(WAIT)
    assert not thread.is_alive()
    assert not loop.engine.scheduler.has_work
    assert loop.engine.blocks.num_free == loop.engine.blocks.num_blocks


class Gate:
    """Lets steps begin one by one, and counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.begun, self.may_go, self.steps = threading.Semaphore(0), threading.Semaphore(0), 0
        step = Engine.step

        def gated(engine: Engine) -> list[StepOutput]:
            self.steps += 1
            self.begun.release()
            assert self.may_go.acquire(timeout=WAIT)
            return step(engine)

        monkeypatch.setattr(Engine, "step", gated)

    def wait(self) -> None:
        assert self.begun.acquire(timeout=WAIT)

    def open(self) -> None:
        self.may_go.release(10_000)


def test_a_thread_steps_for_all(example: LanguageModel, loop: Loop) -> None:
    """Receivers that never wait themselves, beside streams of other threads that do."""
    expected = [list(done.token_ids) for done in example.generate(PROMPTS, GO)]
    receivers = [Receiver() for _ in PROMPTS]
    for receiver, prompt in zip(receivers, PROMPTS, strict=True):
        loop.add(receiver, Request([prompt], GO), frozenset())
    assert list(example.generate(PROMPTS[0], GO).token_ids) == expected[0]
    assert [receiver.wait_for(12)[0] for receiver in receivers] == expected


def test_it_rests_while_there_is_nothing_to_do(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    step = Engine.step

    def counting(engine: Engine) -> list[StepOutput]:
        steps.append(1)
        return step(engine)

    monkeypatch.setattr(Engine, "step", counting)
    time.sleep(0.2)
    assert not steps
    receiver = Receiver()
    loop.add(receiver, Request([PROMPTS[0]], GO), frozenset())
    receiver.wait_for(12)
    time.sleep(0.1)
    assert len(steps) == 12


def test_adding_and_dropping_do_not_wait_for_a_step(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a step runs, both return; the next step has the new request, and not the dropped one."""
    gate = Gate(monkeypatch)
    first, second, third = Receiver(), Receiver(), Receiver()
    loop.add(first, Request([PROMPTS[0]], GO), frozenset())
    gate.wait()  # the step stands
    loop.add(second, Request([PROMPTS[1]], GO), frozenset())
    loop.add(third, Request([PROMPTS[2]], GO), frozenset())
    loop.abandon(first)
    loop.abandon(third)
    assert gate.steps == 1
    gate.may_go.release()
    gate.wait()  # the second step stands
    assert first.sequences[0].finish_reason == "cancelled"
    assert third.sequences[0].finish_reason == "cancelled"
    assert third.sequences[0].num_reused is None  # it was never scheduled
    assert [len(tokens) for tokens in first.tokens.values()] == [1]
    gate.open()
    second.wait_for(12)
    assert [len(tokens) for tokens in first.tokens.values()] == [1]
    assert gate.steps == 13


def test_a_neighbour_of_a_dropped_request_goes_on(example: LanguageModel, loop: Loop) -> None:
    expected = list(example.generate(PROMPTS[1], GO).token_ids)
    for dropped_after in (0, 1, 5):
        dropped, stays = Receiver(), Receiver()
        loop.add(dropped, Request([PROMPTS[0]], SamplingParams(max_new_tokens=500, ignore_eos=True)), frozenset())
        loop.add(stays, Request([PROMPTS[1]], GO), frozenset())
        dropped.wait_for(dropped_after)
        loop.drop(dropped)
        assert stays.wait_for(12) == [expected]


def test_a_request_is_refused_as_a_whole(loop: Loop) -> None:
    receiver = Receiver()
    with pytest.raises(GenerationError, match="outside the model's vocabulary"):
        loop.add(receiver, Request([PROMPTS[0], [-1]], GO), frozenset())
    assert receiver.sequences == ()
    assert not loop.engine.scheduler.has_work


def test_a_failing_step_is_told_and_the_loop_may_run_again(
    example: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, receiver, errors = example.loop, Receiver(), []

    def fail(*_: Any) -> Any:
        raise RuntimeError("device lost")

    def serve() -> None:
        for _ in range(2):
            try:
                loop.run(stopped.is_set)
            except RuntimeError as error:  # noqa: PERF203
                errors.append(str(error))
                monkeypatch.undo()

    stopped = threading.Event()
    monkeypatch.setattr(Engine, "_run", fail)
    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    loop.add(receiver, Request([PROMPTS[0]], GO), frozenset())
    with receiver.changed:
        assert receiver.changed.wait_for(lambda: receiver.error is not None, WAIT)
    assert "device lost" in str(receiver.error)
    again = Receiver()
    loop.add(again, Request([PROMPTS[0]], GO), frozenset())
    again.wait_for(12)
    stopped.set()
    loop.wake()
    thread.join(WAIT)
    assert errors == ["device lost"]


def test_a_client_that_cannot_take_a_token_ends_alone(example: LanguageModel, loop: Loop) -> None:
    """A fault in reading one reply is no other's."""

    class Faulty(Receiver):
        def receive(self, output: StepOutput) -> bool:
            raise ValueError("a reply that\nnobody thought of")

    expected = list(example.generate(PROMPTS[0], GO).token_ids)
    good, faulty = Receiver(), Faulty()
    loop.add(good, Request([PROMPTS[0]], GO), frozenset())
    loop.add(faulty, Request([PROMPTS[1]], GO), frozenset())
    assert good.wait_for(12) == [expected]
    with faulty.changed:
        assert faulty.changed.wait_for(lambda: faulty.error is not None, WAIT)
    assert "a reply that" in str(faulty.error)
