"""Several streams and threads on one model: each gets the text that it would get alone, and nothing is left behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import npuq.runtime
from npuq.errors import GenerationError
from npuq.runtime import EngineConfig, LanguageModel, Piece, SamplingParams
from npuq.runtime.engine import Engine, StepOutput
from npuq.runtime.sampling.rows import HostRow, LogitRow
from npuq.runtime.sampling.sampler import Sampled, Sampler

GO = SamplingParams(max_new_tokens=20, ignore_eos=True)
PROMPTS = ["Call me Ishmael.", "And God said, Let there be light", "The President", "In the beginning"]


@pytest.fixture(scope="module")
def alone(example: LanguageModel) -> list[str]:
    return [example.generate(prompt, GO).text for prompt in PROMPTS]


@pytest.fixture
def model(example: LanguageModel) -> Iterator[LanguageModel]:
    yield example
    gc.collect()
    assert_idle(example)


def assert_idle(model: LanguageModel) -> None:
    assert model.engine.blocks.num_free == model.engine.blocks.num_blocks
    assert not model.engine.scheduler.has_work
    assert not model.loop._clients


def text_of(pieces: Iterator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def test_a_begun_stream_harms_nobody(model: LanguageModel, alone: list[str]) -> None:
    begun = model.stream(PROMPTS[0], GO)
    first = next(begun).text
    assert model.generate(PROMPTS[1], GO).text == alone[1]
    assert first + text_of(begun) == alone[0]


def test_streams_read_in_turn(model: LanguageModel, alone: list[str]) -> None:
    streams = [model.stream(prompt, GO) for prompt in PROMPTS]
    texts = [""] * len(PROMPTS)
    for _ in range(60):
        for index, stream in enumerate(streams):
            texts[index] += "".join(piece.text for piece in [next(stream, None)] if piece is not None)
    assert texts == alone


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_forgotten_stream_ends(model: LanguageModel, alone: list[str], cyclic: bool) -> None:
    """As after `break`: also when the garbage collector comes to it while another stream takes a step."""
    forgotten: Any = model.stream([PROMPTS[0], PROMPTS[2]], GO)
    next(forgotten)
    if cyclic:
        forgotten.itself = forgotten
    del forgotten
    gc.collect()
    assert_idle(model)
    assert model.generate(PROMPTS[1], GO).text == alone[1]


def test_a_stream_forgotten_within_a_step(
    model: LanguageModel, alone: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [model.stream(PROMPTS[0], GO)]
    next(held[0])
    step = Engine.step

    def forgetful(engine: Engine) -> list[StepOutput]:
        held.clear()
        return step(engine)

    monkeypatch.setattr(Engine, "step", forgetful)
    assert model.generate(PROMPTS[1], GO).text == alone[1]


def test_a_closed_stream_ends_at_once(model: LanguageModel) -> None:
    with model.stream(PROMPTS, GO) as stream:
        next(stream)
        assert model.engine.scheduler.has_work
    assert_idle(model)
    assert list(stream) == []
    stream.close()


def test_threads_get_their_own_text(model: LanguageModel, alone: list[str]) -> None:
    """More threads than run at once, some of which leave early, beside one that asks for logits."""
    wrong: list[object] = []
    expected = next(model.logits([[5, 6, 7]]))

    def guarded(work: Callable[[int], None], number: int) -> None:
        try:
            for _ in range(6):
                work(number)
        except BaseException as error:
            wrong.append(error)

    def generates(number: int) -> None:
        if model.generate(PROMPTS[number], GO).text != alone[number]:
            wrong.append(number)

    def leaves(number: int) -> None:
        for piece in model.stream(PROMPTS[number], GO):
            if len(piece.text) > number:
                break

    def asks(_: int) -> None:
        if not torch.equal(next(model.logits([[5, 6, 7]])), expected):
            wrong.append("logits")

    works = [generates, generates, generates, generates, leaves, asks]
    threads = [threading.Thread(target=guarded, args=(work, n % 4), daemon=True) for n, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_threads_share_steps(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads take little more steps than one of them would alone."""
    steps: list[int] = []
    step = Engine.step
    ready = threading.Barrier(2)

    def counting(engine: Engine) -> list[StepOutput]:
        steps.append(threading.get_ident())
        return step(engine)

    monkeypatch.setattr(Engine, "step", counting)

    def work(prompt: str) -> None:
        stream = model.stream(prompt, GO)
        ready.wait()
        for _ in stream:
            pass

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in PROMPTS[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(steps) == GO.max_new_tokens


class Damaged:
    """A sampler that finds damaged logits from the third token on, for sequences that begin with a token."""

    def __init__(self, first: int):
        self.first, self.choose = first, Sampler.next_token

    def __call__(self, sampler: Sampler, row: LogitRow, context: Sequence[int]) -> Sampled:
        if context[0] == self.first and len(context) > 5:
            row = HostRow(np.full(row.size, np.nan, np.float32))
        return self.choose(sampler, row, context)


def test_damaged_logits_end_their_own_request_only(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    good = model.generate([9, 9], GO).token_ids
    damaged = Damaged(5)
    monkeypatch.setattr(Sampler, "next_token", lambda *arguments: damaged(*arguments))
    broken, fine = model.stream([5, 6, 7], GO), model.stream([9, 9], GO)
    pieces = list(fine)
    assert pieces[-1].completion is not None
    assert pieces[-1].completion.token_ids == good
    with pytest.raises(GenerationError, match="not finite"):
        list(broken)
    assert list(broken) == []
    with pytest.raises(GenerationError, match="not finite"):
        model.generate([[9, 9], [5, 6, 7]], GO)


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), MemoryError("no room"), RuntimeError("device lost")])
@pytest.mark.parametrize("within", ["schedule", "_run", "_advance", "_append"])
def test_a_step_that_fails_leaves_a_model_that_works(
    model: LanguageModel, alone: list[str], monkeypatch: pytest.MonkeyPatch, failure: BaseException, within: str
) -> None:
    """Whoever took the step gets the error, all others one that says so; no block is given out twice."""
    other = model.stream([PROMPTS[2], PROMPTS[3]], GO)
    next(other)
    calls = []
    owner = model.engine.scheduler if within == "schedule" else model.engine
    unbroken = getattr(owner, within)

    def breaking(*arguments: Any) -> Any:
        calls.append(1)
        found = unbroken(*arguments)
        if len(calls) == 4:
            raise failure
        return found

    with monkeypatch.context() as patch:
        patch.setattr(owner, within, breaking)
        with pytest.raises(type(failure)):
            model.generate(PROMPTS[0], GO)
    with pytest.raises(GenerationError, match="a step that this prompt took part in has failed"):
        list(other)
    assert_idle(model)
    assert [done.text for done in model.generate(PROMPTS, GO)] == alone
    assert sorted(model.engine.blocks._free) == list(range(model.engine.blocks.num_blocks))


def test_a_failure_is_told_to_each_in_one_line(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(engine: Engine) -> list[StepOutput]:
        raise RuntimeError("\x1b[2J lost\nall")

    streams = [model.stream(prompt, GO) for prompt in PROMPTS[:2]]
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", fail)
        with pytest.raises(RuntimeError):
            model.generate(PROMPTS[2], GO)
    errors = []
    for stream in streams:
        with pytest.raises(GenerationError, match=r"has failed \(\\x1b\[2J lost all\)") as caught:
            next(stream)
        errors.append(caught.value)
    assert errors[0] is not errors[1]  # raised in two threads, one would mix their tracebacks


def test_an_error_is_raised_though_another_thread_closes_the_stream(model: LanguageModel) -> None:
    stream = model.stream(PROMPTS[0], GO)
    errors = [GenerationError("lost")]

    class Closing(type(stream._inbox)):  # type: ignore[misc]
        """An inbox that is closed as soon as its error was looked at."""

        @property
        def error(self) -> GenerationError | None:
            return errors.pop() if errors else None

        @error.setter
        def error(self, value: GenerationError | None) -> None:
            return

        def is_ready(self) -> bool:
            return True

    stream._inbox.__class__ = Closing
    with pytest.raises(GenerationError, match="lost"):
        next(stream)


def test_a_stream_outlives_its_model(example_fp8: Path, alone: list[str]) -> None:
    stream = npuq.runtime.load(example_fp8, "cpu", engine=EngineConfig(kv_cache_bytes=16 << 20)).stream(PROMPTS[0], GO)
    gc.collect()
    assert text_of(stream) == alone[0]
