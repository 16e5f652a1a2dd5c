"""The prefill of a step, bounded in seconds: what is learned from steps, and that texts stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import npuq.runtime
from npuq.errors import GenerationError
from npuq.runtime import EngineConfig, LanguageModel
from npuq.runtime.engine import Engine
from npuq.runtime.step import Chunk
from npuq.runtime.step_budget import StepBudget


def test_without_a_bound_a_step_takes_what_fits() -> None:
    budget = StepBudget(1024)
    budget.measured(1000, 0, 50.0)
    assert budget.prefill_tokens(24) == 1000


def test_tokens_follow_the_time_that_they_take() -> None:
    budget = StepBudget(1024, 0.25, 128)
    assert budget.prefill_tokens(0) == 128  # not measured yet
    budget.measured(120, 0, 0.075)  # 0.625 ms a token
    assert budget.prefill_tokens(0) == 384  # 400 in whole blocks
    budget.measured(0, 8, 0.203125)
    assert budget.prefill_tokens(8) == 75  # the decodes take that time of it
    assert budget.prefill_tokens(0) == 384
    for _ in range(30):
        budget.measured(0, 8, 0.4)
    assert budget.prefill_tokens(8) == 16  # decodes alone take longer: prompts go on
    for _ in range(40):
        budget.measured(384, 0, 1e-9)
    assert budget.prefill_tokens(0) == 1024 - 1024 % 128
    budget = StepBudget(1024, 0.25, 128)
    budget.measured(16, 0, 0.0)
    assert budget.prefill_tokens(1) == 896


def test_what_decodes_take_is_not_prefills() -> None:
    budget = StepBudget(1024, 0.3, 128)
    budget.measured(0, 4, 0.1)
    budget.measured(100, 4, 0.2)  # 1 ms a token
    assert budget.prefill_tokens(0) == 256
    assert budget.prefill_tokens(4) == 128  # 200 in whole blocks


def test_it_settles_where_a_step_takes_its_time() -> None:
    """A step of n tokens that takes a + b·n seconds."""
    budget = StepBudget(4096, 0.25, 16)
    for _ in range(60):
        count = budget.prefill_tokens(0)
        budget.measured(count, 0, 0.05 + 0.0005 * count)
    assert budget.prefill_tokens(0) in (384, 400)


def test_a_slow_machine_reads_prompts_in_small_chunks(
    example: LanguageModel, example_fp8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = list(range(50, 200))
    expected = example.generate([prompt], max_new_tokens=8, temperature=0)[0]
    sizes = EngineConfig(16 << 20, block_size=32, step_seconds=1e-9)
    model = npuq.runtime.load(example_fp8, "cpu", engine=sizes)
    chunks: list[int] = []
    run = Engine._run

    def spy(engine: Engine, given: list[Chunk]) -> Any:
        chunks.extend(len(chunk.token_ids) for chunk in given)
        return run(engine, given)

    monkeypatch.setattr(Engine, "_run", spy)
    (found,) = model.generate([prompt], max_new_tokens=8, temperature=0)
    assert found.token_ids == expected.token_ids
    assert chunks == [32, *[16] * 7, 6, *[1] * 7]


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1", True])
def test_bad_seconds(seconds: Any) -> None:
    with pytest.raises(GenerationError, match="step_seconds must be None or a number above 0"):
        EngineConfig(step_seconds=seconds)
