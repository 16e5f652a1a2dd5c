"""Choosing a token: filters as transformers has them, extremes, and what a draw depends on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from npuq.errors import GenerationError
from npuq.runtime import LanguageModel, SamplingParams
from npuq.runtime.sampling.adjustments import Adjustments
from npuq.runtime.sampling.filters import candidates, scores
from npuq.runtime.sampling.logprobs import token_logprobs
from npuq.runtime.sampling.noise import Noise
from npuq.runtime.sampling.rows import HostRow
from npuq.runtime.sampling.sampler import Sampler

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def choose(sampler: Sampler, logits: Tensor | Sequence[float], context: Sequence[int] = ()) -> int:
    return sampler.next_token(HostRow(np.asarray(logits, np.float32)), context).token


@pytest.mark.parametrize("penalty", [1e300, 1e39, 1e-39, 1e-300, 5e-324])
@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_extreme_penalties_choose_a_token(penalty: float, temperature: float) -> None:
    """Above 1 a token that was not seen is taken, below 1 one that was, whatever float32 can hold."""
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1, repetition_penalty=penalty))
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0, -torch.inf])
    for _ in range(4):
        assert choose(sampler, logits, [0, 1, 2]) == (3 if penalty > 1 else 0)


def test_the_penalty_counts_what_has_come_since() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=1e6))
    context: list[int] = []
    for _ in range(3):
        context.append(choose(sampler, LOGITS, context))
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
        adjusted = Adjustments(params, 0, (), None).apply(logits.numpy(), context.tolist())
        scores, tokens = candidates(HostRow(adjusted), params)
        ours = torch.zeros(64, dtype=torch.float64)
        ours[torch.from_numpy(tokens)] = torch.from_numpy(scores).softmax(0)
        torch.testing.assert_close(ours, golden[0].double().softmax(0), rtol=1e-5, atol=1e-7)


def test_greedy_takes_the_best_and_penalty_moves_it() -> None:
    assert choose(Sampler(SamplingParams()), LOGITS) == 0
    assert choose(Sampler(SamplingParams(repetition_penalty=3.0)), LOGITS, (0, 0)) == 1


@pytest.mark.parametrize("temperature", [1e-5, 1e-30, 1e-38, 1e-40, 1e-300, 5e-324])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=1))
    for logits in (LOGITS, LOGITS.flip(0), torch.tensor([-3e38, 3e38, float("-inf")])):
        assert {choose(sampler, logits, range(position)) for position in range(50)} == {int(logits.argmax())}


def test_a_temperature_beyond_all_is_even() -> None:
    sampler = Sampler(SamplingParams(temperature=1e308, seed=7))
    counts = Counter(choose(sampler, LOGITS, range(position)) for position in range(600))
    assert all(counts[token] > 60 for token in range(len(LOGITS)))


@pytest.mark.parametrize("penalty", [1e-300, 1e300])
def test_an_extreme_penalty_is_no_damage(penalty: float) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=penalty))
    assert choose(sampler, LOGITS, (0, 5)) == (0 if penalty < 1 else 1)
    sampled = Sampler(SamplingParams(repetition_penalty=penalty, temperature=1.0))
    assert choose(sampled, LOGITS, (0, 5)) in range(6)


def test_damaged_logits_are_refused() -> None:
    for bad in (torch.full((4,), float("nan")), torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])):
        with pytest.raises(GenerationError, match="not finite"):
            choose(Sampler(SamplingParams()), bad)


def test_seeded_sampling_does_not_depend_on_company(example: LanguageModel) -> None:
    options = {"max_new_tokens": 16, "temperature": 1.0, "seed": 11}
    alone = example.generate("The whale", **options).text
    among = example.generate(["And he said unto them", "The whale", "Of the Congress"], **options)
    assert among[1].text == alone
    assert example.generate("The whale", **options).text == alone
    assert example.generate("The whale", **{**options, "seed": 12}).text != alone


def test_unseeded_sampling_varies(example: LanguageModel) -> None:
    assert len({example.generate("The", max_new_tokens=16, temperature=1.5).text for _ in range(4)}) > 1


ROWS = [
    np.random.default_rng(1).standard_normal(9000).astype(np.float32) * 4,
    np.random.default_rng(2).integers(-3, 3, 9000).astype(np.float32),  # many are equal
    np.zeros(9000, np.float32),
    np.where(np.arange(9000) % 64 == 0, 5, np.random.default_rng(3).standard_normal(9000)).astype(np.float32),
    np.where(np.arange(9000) == 8999, 3, -np.inf).astype(np.float32),
]


@pytest.mark.parametrize("logits", ROWS)
@pytest.mark.parametrize("count", [1, 2, 128, 1024, 1125, 8999, 9000, 10000])
def test_the_best_are_the_first_of_all_in_order(logits: np.ndarray, count: int) -> None:
    """Equal ones by token id."""
    values, ids = HostRow(logits).best(count)
    order = np.argsort(-logits.astype(np.float64), kind="stable")[:count]
    assert np.array_equal(ids, order)
    assert np.array_equal(values, logits[order])


@pytest.mark.parametrize("logits", ROWS)
@pytest.mark.parametrize("temperature", [0.01, 0.6, 1.0, 30.0])
def test_without_filters_the_best_of_all_noisy_scores_wins(logits: np.ndarray, temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature, seed=8))
    everything = np.arange(len(logits))
    for position in range(60):
        noisy = scores(logits, logits.max(), temperature) + Noise(8).gumbel(position, everything)
        assert choose(sampler, logits, range(position)) == int(noisy.argmax())


@pytest.mark.parametrize("options", [{"top_p": 0.99}, {"top_p": 0.5}, {"min_p": 0.01}, {"top_p": 0.9, "min_p": 0.02}])
def test_looking_at_few_first_changes_nothing(options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(temperature=0.9, seed=1, **options)  # type: ignore[arg-type]
    few = [candidates(HostRow(row), params) for row in ROWS]
    monkeypatch.setattr("npuq.runtime.sampling.filters.SHORTLIST", 10**6)
    for row, (found, ids) in zip(ROWS, few, strict=True):
        expected, expected_ids = candidates(HostRow(row), params)
        assert np.array_equal(ids, expected_ids)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("count", [0, 1, 5])
def test_logprobs_are_the_models_own(count: int) -> None:
    """Before temperature, penalties and filters."""
    for logits in (*ROWS[:2], np.asarray(LOGITS)):
        golden = torch.from_numpy(logits).double().log_softmax(0)
        options = {"temperature": 0.3, "top_k": 3, "repetition_penalty": 2.0, "presence_penalty": 1.5, "seed": 4}
        sampler = Sampler(SamplingParams(logprobs=count, logit_bias={1: 50}, **options))  # type: ignore[arg-type]
        sampled = sampler.next_token(HostRow(logits), [0, 1])
        assert sampled.logprobs is not None
        assert sampled.logprobs.token == sampled.token == 1
        assert sampled.logprobs.logprob == pytest.approx(float(golden[1]), rel=1e-6)
        assert sampled.logprobs == token_logprobs(HostRow(logits), 1, count)
        expected = np.argsort(-logits, kind="stable")[:count]
        assert [token for token, _ in sampled.logprobs.top] == expected.tolist()
        assert [value for _, value in sampled.logprobs.top] == pytest.approx(golden[expected].tolist(), rel=1e-6)


class Script:
    """A grammar that allows one text, or ends."""

    def __init__(self, tokens: Sequence[int]):
        self.left = list(tokens)

    def mask(self) -> np.ndarray:
        mask = np.zeros(len(LOGITS) - 1, np.bool_)  # a token less than the model has
        mask[self.left[:1]] = True
        return mask

    def accept(self, token: int) -> None:
        assert self.left.pop(0) == token


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_says_what_comes(temperature: float) -> None:
    sampler = Sampler(SamplingParams(temperature=temperature), grammar=Script([3, 4, 0]))
    context: list[int] = []
    for _ in range(3):
        context.append(choose(sampler, [*LOGITS[:-1], 9.0], context))
    assert context == [3, 4, 0]
    with pytest.raises(GenerationError, match="no token is allowed next"):
        choose(sampler, LOGITS, context)


def test_ids_outside_the_vocabulary_end_nothing() -> None:
    """Ends may come from a damaged config.json."""
    sampler = Sampler(SamplingParams(min_tokens=2), ends=[-1, 0, 99])
    assert choose(sampler, LOGITS) == 1
