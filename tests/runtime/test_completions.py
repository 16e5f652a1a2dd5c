"""What a request's parameters do to its completions: ends, choices, log-probabilities, seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import npuq.runtime
from npuq.errors import GenerationError
from npuq.runtime import EngineConfig, LanguageModel

from .text.plain_text import PlainText

PROMPT = "The whale"
SAMPLED: dict[str, Any] = {"max_new_tokens": 24, "temperature": 1.0, "seed": 11, "ignore_eos": True}
GREEDY: dict[str, Any] = {"max_new_tokens": 24, "temperature": 0, "ignore_eos": True}


def test_seeded_text_depends_on_nothing_else(example: LanguageModel, example_fp8: Path) -> None:
    """Company, chunks and preemption change nothing; another seed does."""
    alone = example.generate(PROMPT, **SAMPLED).text
    among = example.generate(["And he said unto them", PROMPT, "Of the Congress"], **SAMPLED)
    assert among[1].text == alone
    assert example.generate(PROMPT, **{**SAMPLED, "seed": -12}).text != alone
    sizes = EngineConfig(6 * 16 * 576 * 4 * 4, block_size=16, max_num_seqs=4, max_num_batched_tokens=7)
    small = npuq.runtime.load(example_fp8, "cpu", engine=sizes)
    assert [done.text for done in small.generate([PROMPT] * 4, **SAMPLED)] == [alone] * 4
    assert small.engine.scheduler.num_preempted > 0


def test_choices_of_a_prompt(example: LanguageModel) -> None:
    prompts = [PROMPT, "In the beginning"]
    done = example.generate(prompts, n=3, **SAMPLED)
    assert len({each.text for each in done}) == 6
    assert [each.prompt_tokens for each in done] == [2] * 3 + [3] * 3
    assert done[0] == pytest.approx(done[0])
    assert done[0].token_ids == example.generate(PROMPT, **SAMPLED).token_ids
    assert [each.token_ids for each in example.generate(prompts[1:], n=3, **SAMPLED)] == [
        each.token_ids for each in done[3:]
    ]
    with pytest.raises(GenerationError, match="give the prompt in a list"):
        example.generate(PROMPT, n=2)
    assert {piece.index for piece in example.stream(PROMPT, n=2, **SAMPLED)} == {0, 1}


def test_stop_tokens(example: LanguageModel) -> None:
    free = example.generate(PROMPT, **GREEDY)
    end = next(token for token in free.token_ids[5:] if token not in free.token_ids[:5])
    first = free.token_ids.index(end)
    done = example.generate(PROMPT, stop_token_ids=[end, 0], logprobs=0, **GREEDY)
    assert (done.finish_reason, done.token_ids) == ("stop", free.token_ids[: first + 1])
    assert done.text == example.tokenizer.decode(free.token_ids[:first])
    assert done.logprobs is not None
    assert len(done.logprobs) == first  # the end has no text
    later = example.generate(PROMPT, stop_token_ids=[end], min_tokens=first + 3, **GREEDY)
    assert end not in later.token_ids[: first + 3]
    assert later.token_ids[:first] == free.token_ids[:first]


def test_a_bias_forbids_and_forces(example: LanguageModel) -> None:
    (word,) = example.tokenizer.encode(" sea")[:1]
    forced = example.generate(PROMPT, logit_bias={word: 100}, **GREEDY)
    assert set(forced.token_ids) == {word}
    first = example.generate(PROMPT, **GREEDY).token_ids[0]
    assert example.generate(PROMPT, logit_bias={first: -100}, **GREEDY).token_ids[0] != first


@pytest.mark.parametrize("options", [{"logit_bias": {4096: 1}}, {"stop_token_ids": [1, 4096]}])
def test_ids_outside_the_vocabulary(example: LanguageModel, options: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=f"{next(iter(options))} 4096 is outside the model's vocabulary of 4096"):
        example.generate(PROMPT, **options)
    assert not example.engine.scheduler.has_work


@pytest.mark.parametrize(
    "options", [GREEDY, {**SAMPLED, "top_k": 5, "repetition_penalty": 1.5}], ids=["greedy", "sampled"]
)
def test_logprobs_of_a_completion(example: LanguageModel, options: dict[str, Any]) -> None:
    """As from the logits of the whole text, and the same in the pieces."""
    pieces = list(example.stream(PROMPT, logprobs=3, **options))
    done = pieces[-1].completion
    assert done is not None
    assert done.logprobs is not None
    prompt = example.tokenizer.encode(PROMPT)
    golden = next(example.logits([[*prompt, *done.token_ids]])).double().log_softmax(-1)[len(prompt) - 1 : -1]
    assert [each.token for each in done.logprobs] == list(done.token_ids)
    assert len(golden) == len(done.logprobs)
    for expected, found in zip(golden, done.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(expected[found.token]), abs=1e-3)
        values, _ = expected.topk(3)
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-3)
    assert tuple(each for piece in pieces for each in piece.logprobs) == done.logprobs
    assert tuple(token for piece in pieces for token in piece.token_ids) == done.token_ids
    assert example.generate(PROMPT, **options).logprobs is None


def test_a_stop_string_cuts_tokens_as_it_cuts_text(example: LanguageModel) -> None:
    """Also one that begins within a token: that token stays, those behind it go."""
    free = example.generate(PROMPT, **SAMPLED)
    texts = [example.tokenizer.decode(free.token_ids[:count]) for count in range(25)]
    place = len(texts[6]) + 1
    stop = free.text[place : place + 8]
    assert len(texts[7]) > place
    assert free.text.index(stop) == place
    done = example.generate(PROMPT, stop=stop, logprobs=0, **SAMPLED)
    assert done.text == free.text[:place]
    assert done.logprobs is not None
    assert [each.token for each in done.logprobs] == list(free.token_ids[:7])
    pieces = list(example.stream(PROMPT, stop=stop, logprobs=0, **SAMPLED))
    assert tuple(token for piece in pieces for token in piece.token_ids) == free.token_ids[:7]
    late = example.generate(PROMPT, stop=stop, min_tokens=24, **SAMPLED)
    assert (late.text, late.finish_reason) == (free.text, "length")


class Alternating:
    """A grammar of two tokens in turn, which ends in a dead end."""

    def __init__(self, tokens: Sequence[int], size: int, length: int):
        self.tokens, self.size, self.left = tokens, size, length

    def mask(self) -> NDArray[np.bool_]:
        mask = np.zeros(self.size, np.bool_)
        if self.left:
            mask[self.tokens[self.left % 2]] = True
        return mask

    def accept(self, token: int) -> None:
        assert token == self.tokens[self.left % 2]
        self.left -= 1


def test_a_grammar_is_one_completions_own(example: LanguageModel) -> None:
    def make() -> Alternating:
        return Alternating((7, 9), 4096, 6)

    with example.stream(PROMPT, n=2, grammar=make, **{**SAMPLED, "max_new_tokens": 6}) as stream:
        done = [piece.completion for piece in stream if piece.completion is not None]
    assert [each.token_ids for each in done] == [(7, 9, 7, 9, 7, 9)] * 2
    with pytest.raises(GenerationError, match="no token is allowed next"):
        list(example.stream(PROMPT, grammar=make, **GREEDY))
    assert example.engine.blocks.num_free == example.engine.blocks.num_blocks


@settings(max_examples=60, deadline=None)
@given(data=st.data(), stops=st.lists(st.text("ab é🐳", min_size=1, max_size=4), max_size=3))
def test_text_and_tokens_end_together(example: LanguageModel, data: st.DataObject, stops: list[str]) -> None:
    """Whatever the tokens and stops: pieces make the text up to the first stop, and its tokens are settled."""
    text = data.draw(st.text("ab é🐳", max_size=30))
    ids = example.tokenizer.encode(text, special=False)
    early = data.draw(st.integers(0, 5))
    stream = PlainText(example.tokenizer, [], stops, early)
    given_text = ""
    for token in ids:
        given_text += stream.add(token)
        if stream.stopped:
            break
    given_text += stream.flush()
    assert given_text == stream.text
    whole = example.tokenizer.decode(ids)
    assert whole.startswith(given_text)
    if not stream.stopped:
        assert given_text == whole
        assert stream.num_settled == len(ids)
        return
    assert any(whole.startswith(stop, len(given_text)) for stop in stops)
    settled = example.tokenizer.decode(ids[: stream.num_settled])
    assert settled.startswith(given_text) or settled.rstrip("\N{REPLACEMENT CHARACTER}") == given_text
    before = example.tokenizer.decode(ids[: max(0, stream.num_settled - 1)]).rstrip("\N{REPLACEMENT CHARACTER}")
    assert len(before) <= len(given_text)
