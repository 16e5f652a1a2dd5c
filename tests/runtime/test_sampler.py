"""Sampling: the distribution drawn from, and what it depends on."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from npuq.errors import GenerationError
from npuq.runtime import LanguageModel, SamplingParams
from npuq.runtime.sampler import Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
DRAWS = 4000


def softmax(logits: Tensor | np.ndarray) -> np.ndarray:
    values = np.exp(np.asarray(logits, np.float64))
    return values / values.sum()


def frequencies(context: tuple[int, ...] = (), **options: object) -> np.ndarray:
    sampler = Sampler(SamplingParams(seed=7, **options))  # type: ignore[arg-type]
    counts = Counter(sampler.next_token(LOGITS, context) for _ in range(DRAWS))
    return np.array([counts[token] for token in range(len(LOGITS))]) / DRAWS


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, softmax(LOGITS)),
        ({"temperature": 0.5}, softmax(LOGITS / 0.5)),
        ({"temperature": 1.0, "top_k": 2}, softmax(LOGITS[:2])),
        # probabilities .56 .21 .13 …: two of them do not reach 0.8, three do.
        ({"temperature": 1.0, "top_p": 0.8}, softmax(LOGITS[:3])),
        ({"temperature": 1.0, "top_p": 1e-6}, np.array([1.0])),
        # at least 0.3 of the best: e^-1 is, e^-1.5 is not.
        ({"temperature": 1.0, "min_p": 0.3}, softmax(LOGITS[:2])),
        ({"temperature": 1.0, "top_k": 100}, softmax(LOGITS)),
    ],
)
def test_distribution(options: dict[str, float], expected: np.ndarray) -> None:
    expected = np.pad(expected, (0, len(LOGITS) - len(expected)))
    seen = frequencies(**options)
    assert not seen[expected == 0].any()
    # Four standard deviations of a binomial count.
    assert (np.abs(seen - expected) <= 4 * np.sqrt(expected * (1 - expected) / DRAWS)).all()


@pytest.mark.parametrize("penalty", [1e300, 1e39, 1e-39, 1e-300, 5e-324])
@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_extreme_penalties_choose_a_token(penalty: float, temperature: float) -> None:
    """Above 1 a token that was not seen is taken, below 1 one that was, whatever float32 can hold."""
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1, repetition_penalty=penalty))
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf])
    for _ in range(4):
        assert sampler.next_token(logits, [0, 1, 2]) == (3 if penalty > 1 else 0)


def test_the_penalty_counts_what_has_come_since() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1e6))
    context: list[int] = []
    for _ in range(3):
        context.append(sampler.next_token(LOGITS, context))
    assert context == [0, 1, 2]  # none is likely any more once it was said


def test_transformers_filters_leave_the_same_tokens() -> None:
    """Filters in transformers' order, on many random rows."""
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from npuq.runtime.sampler import _candidates, _penalise, _Seen

    params = SamplingParams(temperature=0.7, top_k=20, top_p=0.8, min_p=0.05, repetition_penalty=1.3)
    warpers = [
        RepetitionPenaltyLogitsProcessor(1.3),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(20),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.05),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(50):
        logits = torch.randn(64, generator=generator) * 2
        context = torch.randint(0, 64, (9,), generator=generator)
        golden = logits[None].clone()
        for warper in warpers:
            golden = warper(context[None], golden)
        tokens, probabilities = _candidates(_penalise(logits, _Seen().ids(context.tolist()), 1.3), params)
        ours = torch.zeros(64, dtype=torch.float64).index_copy(0, tokens, probabilities / probabilities.sum())
        torch.testing.assert_close(ours, golden[0].double().softmax(0), rtol=1e-5, atol=1e-7)


def test_greedy_takes_the_best_and_penalty_moves_it() -> None:
    assert Sampler(SamplingParams()).next_token(LOGITS, ()) == 0
    assert Sampler(SamplingParams(repetition_penalty=3.0)).next_token(LOGITS, (0, 0)) == 1


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-38, 1e-40, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1))
    for logits in (LOGITS, LOGITS.flip(0), torch.tensor([-3e38, 3e38, float("-inf")])):
        assert {sampler.next_token(logits, ()) for _ in range(50)} == {int(logits.argmax())}


def test_a_temperature_beyond_all_is_even() -> None:
    assert (frequencies(temperature=1e308) > 0.1).all()


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_an_extreme_penalty_is_no_damage(penalty: float) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=penalty))
    assert sampler.next_token(LOGITS, (0, 5)) == (0 if penalty < 1 else 1)
    assert Sampler(SamplingParams(repetition_penalty=penalty, temperature=1.0)).next_token(LOGITS, (0, 5)) in range(6)


def test_damaged_logits_are_refused() -> None:
    for bad in (torch.full((4,), float("nan")), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])):
        with pytest.raises(GenerationError, match="not finite"):
            Sampler(SamplingParams()).next_token(bad, ())


def test_seeded_sampling_does_not_depend_on_company(example: LanguageModel) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.0, "seed": 11}
    alone = example.generate("The whale", **options).text
    among = example.generate(["And he said unto them", "The whale", "Of the Congress"], **options)
    assert among[1].text == alone
    assert example.generate("The whale", **options).text == alone
    assert example.generate("The whale", **{**options, "seed": 12}).text != alone


def test_unseeded_sampling_varies(example: LanguageModel) -> None:
    assert len({example.generate("The", max_new_tokens=16, temperature=1.5).text for _ in range(4)}) > 1
