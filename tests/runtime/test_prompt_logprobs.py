"""Log-probabilities of a prompt's tokens: those that `evaluate` computes, in whatever chunks the prompt is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import npuq
from npuq.runtime import EngineConfig, LanguageModel
from npuq.runtime.evaluation.perplexity import evaluate


def expected(model: LanguageModel, tokens: list[int]) -> list[float]:
    (logits,) = model.logits([tokens])
    scores = logits.float().log_softmax(-1)
    return [float(scores[place, token]) for place, token in enumerate(tokens[1:])]


def found(model: LanguageModel, tokens: list[int], **options: object) -> list[float]:
    (done,) = model.generate([tokens], max_new_tokens=1, temperature=0, prompt_logprobs=2, **options)  # type: ignore[arg-type]
    assert done.prompt_logprobs is not None
    assert [entry.token for entry in done.prompt_logprobs] == tokens[1:]
    return [entry.logprob for entry in done.prompt_logprobs]


@pytest.fixture(scope="module")
def tokens(example: LanguageModel, eval_text: Path) -> list[int]:
    return example.tokenizer.encode(eval_text.read_text(encoding="utf-8")[:4000])[:400]


def test_they_are_those_of_logits_to_the_bit(example: LanguageModel, tokens: list[int]) -> None:
    for part in (tokens[:2], tokens[:300], tokens):
        assert found(example, part) == expected(example, part)


def test_their_mean_is_the_perplexity_of_evaluate(example: LanguageModel, eval_text: Path) -> None:
    text = eval_text.read_text(encoding="utf-8")[:600]
    tokens = [example.tokenizer.bos_id, *example.tokenizer.encode(text, special=False)]
    judged = evaluate(example, text, context=512)
    scores = found(example, [token for token in tokens if token is not None])
    assert len(scores) == judged.tokens
    assert torch.tensor(scores, dtype=torch.float64).mean().neg().exp().item() == pytest.approx(
        judged.perplexity, abs=1e-9
    )


def test_the_likeliest_tokens_come_first(example: LanguageModel, tokens: list[int]) -> None:
    (done,) = example.generate([tokens[:50]], max_new_tokens=1, prompt_logprobs=3)
    assert done.prompt_logprobs is not None
    (logits,) = example.logits([tokens[:50]])
    for entry, row in zip(done.prompt_logprobs, logits.float().log_softmax(-1), strict=False):
        assert [token for token, _ in entry.top] == row.topk(3).indices.tolist()
        assert [value for _, value in entry.top] == row.topk(3).values.tolist()


def test_chunks_hits_choices_and_preemption_change_nothing(example_fp8: Path, tokens: list[int]) -> None:
    """With a cache of few blocks and a small step, beside other prompts."""
    config = EngineConfig(3 << 20, block_size=16, max_num_seqs=4, max_num_batched_tokens=48)
    small = npuq.runtime.load(example_fp8, "cpu", engine=config)
    long, other = tokens[:150], tokens[100:180]
    prompts = [other, long, tokens[200:280]]
    wanted = [expected(small, prompt) for prompt in prompts]
    before = small.generate([long[:140]], max_new_tokens=2)  # its blocks are known, and not taken
    assert before[0].prompt_logprobs is None
    done = small.generate(prompts, max_new_tokens=60, temperature=0, prompt_logprobs=0, ignore_eos=True, n=2)
    assert small.engine.scheduler.num_preempted > 0
    firsts = [each.prompt_logprobs for each in done[::2]]
    for entries, values in zip(firsts, wanted, strict=True):
        assert entries is not None
        assert [entry.logprob for entry in entries] == pytest.approx(values, abs=2e-4)
    assert all(each.prompt_logprobs is None for each in done[1::2])
    assert all(entry.top == () for entries in firsts for entry in entries or ())
    assert all(each.cached_tokens == 0 for each in done[::2])


def test_a_prompt_of_one_token_has_none(example: LanguageModel, tokens: list[int]) -> None:
    assert found(example, tokens[:1]) == []
