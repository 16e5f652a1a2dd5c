"""Logits that stay on the device, against the same rows on the host; and what of them is copied."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from ascend_rig import emulate, harness
from torch import Tensor

from npuq.runtime.ops.ascend import logits as logits_module
from npuq.runtime.ops.ascend.logits import COUNTS, MOST_TEMPERATURES, device_rows
from npuq.runtime.sampling.params import SamplingParams
from npuq.runtime.sampling.rows import host_rows

VOCABULARY = 9000


def rows(dtype: torch.dtype) -> Tensor:
    """Logits of which few are equal, and many equal ones far from the best, and two best ones."""
    logits = 4 * torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(4))
    logits[1, 100:4000] = -3.0
    logits[2, [4000, 17, 901]] = 60.0
    return logits.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_row_on_the_device_answers_as_one_on_the_host(dtype):
    for ours, theirs in zip(device_rows(rows(dtype)), host_rows(rows(dtype)), strict=True):
        assert ours.size == theirs.size == VOCABULARY
        for count in (1, 5, COUNTS[0], COUNTS[0] + 1, COUNTS[1] + 1, VOCABULARY, VOCABULARY + 3):
            values, ids = ours.best(count)
            expected, their_ids = theirs.best(count)
            assert np.array_equal(values, expected)
            assert count < VOCABULARY or np.array_equal(ids, their_ids)
            # Of equal logits on the last places the device takes any.
            above = expected > expected[-1]
            assert np.array_equal(ids[above], their_ids[above])
        some = np.array([4000, 17, 0, VOCABULARY - 1])
        assert np.array_equal(ours.at(some), theirs.at(some))
        for temperature in (1e-30, 0.3, 1.0, 50.0):
            assert ours.total(temperature) == pytest.approx(theirs.total(temperature), rel=1e-5)
        assert np.array_equal(ours.whole(), theirs.whole())


def test_the_earlier_of_two_best_tokens_is_chosen():
    assert device_rows(rows(torch.bfloat16))[2].best(3)[1].tolist() == [17, 901, 4000]


@pytest.mark.parametrize("place", [0, VOCABULARY - 1])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_logit_that_is_no_number_shows_first(place, wrong):
    logits = rows(torch.float32)
    logits[1, place] = wrong
    first = [row.best(1)[0][0] for row in device_rows(logits)]
    assert np.isfinite(first[0]) and np.isnan(first[1]) and np.isfinite(first[2])


def test_nothing_keeps_the_logits_of_a_step_that_is_over():
    """Not even until the next collection of garbage: on a device these are many megabytes a step."""
    gc.disable()
    try:
        found = device_rows(rows(torch.bfloat16))
        assert found[0].best(3) and found[1].total(0.7)
        held = weakref.ref(found[0]._rows)
        del found
        assert held() is None
    finally:
        gc.enable()


def test_rows_of_many_temperatures_are_summed_once_each(monkeypatch):
    summed: list[int] = []
    original = logits_module._totals

    def noting(logits: Tensor, temperature: float) -> Tensor:
        summed.append(logits.numel() // VOCABULARY)
        return original(logits, temperature)

    monkeypatch.setattr(logits_module, "_totals", noting)
    many = torch.randn(50, VOCABULARY, generator=torch.Generator().manual_seed(5))
    for index, (ours, theirs) in enumerate(zip(device_rows(many), host_rows(many), strict=True)):
        temperature = 0.5 + index / 50
        assert ours.total(temperature) == pytest.approx(theirs.total(temperature), rel=1e-5)
    assert sum(summed) == MOST_TEMPERATURES * 50 + 50 - MOST_TEMPERATURES


def test_a_short_vocabulary():
    values, ids = device_rows(torch.tensor([[1.0, 3.0, 2.0]]))[0].best(9)
    assert values.tolist() == [3.0, 2.0, 1.0] and ids.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    "params", [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=3, temperature=0.8, top_k=20, seed=1)]
)
def test_logits_are_never_copied_whole(artifact, params, monkeypatch):
    """Greedy and top-k sampling of two sequences: one copy a step, of so many numbers a row."""
    copied: list[int] = []
    original = Tensor.to

    def noting(tensor: Tensor, *args: object, **kwargs: object) -> Tensor:
        if args and args[0] == "cpu":
            copied.append(tensor.numel())
        return original(tensor, *args, **kwargs)

    with emulate.use_rules(wide=True):
        engine = harness.load(artifact("example"), harness.make("ascend")).engine
        vocabulary = engine.model.config.vocab_size
        assert vocabulary > 2 * COUNTS[0] + 1
        for prompt in ([5, 6, 7], [9, 8]):
            engine.add(prompt, params)
        monkeypatch.setattr(Tensor, "to", noting)
        outputs = [engine.step() for _ in range(3)]
    assert all(output.token is not None for step in outputs for output in step)
    assert copied and max(copied) == 2 * (2 * COUNTS[0] + 1) and len(copied) == 3
