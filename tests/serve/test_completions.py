"""`/v1/completions` by the official client, over a real socket."""

from __future__ import annotations

import asyncio
import math
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Running, running

from npuq.runtime import LanguageModel, SamplingParams, evaluate
from npuq.runtime.sampling.sampler import Sampler
from npuq.serve import responding
from npuq.serve.completions.documents import CompletionReply
from npuq.serve.limits import Limits
from npuq.serve.service import Service

PROMPT = "The quick brown"


def test_a_text_is_the_models_own(client: openai.OpenAI, model: LanguageModel) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16)
    expected = model.generate(PROMPT, max_new_tokens=16, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected.completion_tokens
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.total_tokens == expected.prompt_tokens + expected.completion_tokens


def test_a_stream_has_the_same_text(client: openai.OpenAI, model: LanguageModel) -> None:
    """With usage at its end, without empty chunks before it, also where a stop string is held back."""
    expected = model.generate(PROMPT, max_new_tokens=24, temperature=0)
    stop = expected.text[-4:-1]
    chunks = list(
        client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=24, stream=True, stop=[stop], stream_options={"include_usage": True}
        )
    )
    *texts, last, usage = chunks
    assert all(chunk.choices[0].text for chunk in texts)
    assert "".join(chunk.choices[0].text for chunk in [*texts, last]) == expected.text[: expected.text.index(stop)]
    assert last.choices[0].finish_reason == "stop"
    assert all(chunk.choices[0].finish_reason is None for chunk in texts)
    assert usage.choices == [] and usage.usage is not None
    assert len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("form", ["texts", "ids"])
def test_several_prompts_have_choices_in_their_order(client: openai.OpenAI, model: LanguageModel, form: str) -> None:
    texts = ["The law", "A section", "The House of"]
    prompts = [model.tokenizer.encode(text) for text in texts] if form == "ids" else texts
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=6, n=2, seed=3, temperature=0.8)
    expected = model.generate(texts, SamplingParams(max_new_tokens=6, n=2, seed=3, temperature=0.8))
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [done.text for done in expected]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(done.prompt_tokens for done in expected[::2])


def test_every_field_reaches_the_sampler(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under the names of OpenAI and vLLM; a null is a field left out."""
    seen = []
    admit = server.service.admit
    monkeypatch.setattr(
        server.service, "admit", lambda request, **how: (seen.append(request.params), admit(request, **how))[1]
    )
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"5": -3},
        "min_tokens": 2,
        "stop": ["x", "y"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "seed": 7,
        "n": 2,
        "logprobs": 3,
    }
    assert server.complete(prompt="A", max_tokens=3, **fields).status == 200
    assert server.complete(prompt="A", max_tokens=1, **dict.fromkeys(fields), model=None).status == 200
    assert server.complete(prompt="A", max_tokens=1, top_k=-1).status == 200
    fields |= {"logit_bias": {5: -3.0}}
    assert seen == [
        SamplingParams(max_new_tokens=3, **fields),
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=1, top_k=0),
    ]


def test_log_probabilities(client: openai.OpenAI, model: LanguageModel) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, logprobs=2)
    expected = model.generate(PROMPT, max_new_tokens=8, temperature=0, logprobs=2)
    found, entries = answer.choices[0].logprobs, expected.logprobs
    assert found is not None and entries is not None
    assert found.token_logprobs == [entry.logprob for entry in entries]
    assert "".join(found.tokens or []) == expected.text
    assert found.text_offset == [len("".join((found.tokens or [])[:place])) for place in range(8)]
    for token, top, entry in zip(found.tokens or [], found.top_logprobs or [], entries, strict=True):
        assert len(top) == 2 and max(top, key=lambda text: top[text]) == token
        assert sorted(top.values(), reverse=True) == [value for _, value in entry.top]
    chunks = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, logprobs=2, stream=True))
    streamed = [entry for chunk in chunks for entry in chunk.choices[0].logprobs.token_logprobs]  # type: ignore[union-attr]
    assert streamed == found.token_logprobs


def test_a_harness_finds_the_likelihoods_of_evaluate(
    client: openai.OpenAI, model: LanguageModel, eval_text: Path
) -> None:
    """As lm_eval's local-completions asks: ids of several prompts, their echo, one token that it drops."""
    text = eval_text.read_text(encoding="utf-8")[:900]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text, special=False)]
    judged = evaluate(model, text, context=512)
    prompts = [ids, ids[:30]]
    answer = client.completions.create(
        model="tiny", prompt=prompts, max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    for choice, prompt in zip(answer.choices, prompts, strict=True):
        found = choice.logprobs
        assert found is not None and found.tokens is not None and found.token_logprobs is not None
        assert len(found.tokens) == len(prompt) + 1
        assert found.token_logprobs[0] is None
        assert found.top_logprobs is not None and len(found.top_logprobs) == len(prompt) + 1
    assert answer.choices[0].text.startswith(text[:50])
    scores = (answer.choices[0].logprobs or found).token_logprobs[1:-1]
    assert math.exp(-math.fsum(scores) / len(scores)) == pytest.approx(judged.perplexity, rel=1e-4)
    assert len(scores) == judged.tokens


def test_nothing_but_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="A text", max_tokens=0, echo=True, logprobs=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == ("A text", "length")
    assert choice.logprobs is not None and choice.logprobs.tokens is not None
    assert "".join(choice.logprobs.tokens).endswith("A text")
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    chunks = list(client.completions.create(model="tiny", prompt="A text", max_tokens=2, echo=True, stream=True))
    assert chunks[0].choices[0].text == "A text"


@pytest.mark.parametrize("few", [4096, 5])
def test_a_streams_prompt_has_its_log_probabilities(
    client: openai.OpenAI, model: LanguageModel, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the first chunk of each choice. Those of a long prompt are made beside the event loop."""
    monkeypatch.setattr(responding, "_FEW_TOKENS", few)
    prompts = ["A text of the law", model.tokenizer.encode("語 A section of this title")]
    for fields in (
        {"prompt": prompts[0], "max_tokens": 6},
        {"prompt": prompts[0], "max_tokens": 0},
        {"prompt": prompts[1], "max_tokens": 3, "n": 2, "temperature": 0.8, "seed": 3},
        {"prompt": [model.tokenizer.encode("One text"), prompts[1]], "max_tokens": 3, "n": 2},
    ):
        asked: Any = {"model": "tiny", "echo": True, "logprobs": 2, **fields}
        whole = client.completions.create(**asked)
        chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage is not None and whole.usage is not None
        assert chunks.pop().usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]
        for choice in whole.choices:
            first, *others = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
            assert first.logprobs is not None and choice.logprobs is not None
            assert (first.logprobs.token_logprobs or [0])[0] is None and first.finish_reason is None
            assert "".join([first.text, *(other.text for other in others)]) == choice.text
            assert others[-1].finish_reason == choice.finish_reason
            for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
                parts = [getattr(each.logprobs, name) for each in (first, *others) if each.logprobs is not None]
                assert [entry for part in parts for entry in part] == getattr(choice.logprobs, name)


def test_token_ids(server: Running, model: LanguageModel) -> None:
    expected = model.generate(PROMPT, max_new_tokens=4, temperature=0)
    (choice,) = server.complete(prompt=PROMPT, max_tokens=4, return_token_ids=True).json["choices"]
    assert choice["token_ids"] == list(expected.token_ids)
    assert choice["prompt_token_ids"] == model.tokenizer.encode(PROMPT)
    (choice,) = server.complete(prompt=PROMPT, max_tokens=4).json["choices"]
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}


@pytest.mark.parametrize("text", ["語🙂é", "👩‍👩‍👧 x", "a語b"])
def test_characters_arrive_whole(
    client: openai.OpenAI, model: LanguageModel, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of tokens that are a byte each; a text that ends within one has its mark."""
    tokens, length = model.tokenizer.encode(text, special=False), len(model.tokenizer.encode("X"))
    assert len(tokens) > len(text)
    monkeypatch.setattr(Sampler, "_choose", lambda self, row, context: tokens[len(context) - length])
    for count in (len(tokens), len(tokens) - 1):
        chunks = client.completions.create(model="tiny", prompt="X", max_tokens=count, stream=True)
        texts = [chunk.choices[0].text for chunk in chunks]
        assert "".join(texts) == model.tokenizer.decode(tokens[:count])
        assert not any("\ufffd" in each for each in texts[:-1])


def test_what_the_cache_held_is_in_the_usage(client: openai.OpenAI) -> None:
    prompt = "A text that is longer than a block of the cache, all in all. " * 12
    first, second = (client.completions.create(model="tiny", prompt=prompt, max_tokens=1) for _ in range(2))
    assert first.usage is not None and first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert second.usage.prompt_tokens_details.cached_tokens >= 128
    assert first.choices[0].text == second.choices[0].text


def test_a_salt_hides_what_the_cache_holds(client: openai.OpenAI, model: LanguageModel) -> None:
    """In both directions: of its own client, and of others; and one API key hides it from another."""
    prompt = "Another text that is longer than a block of the cache, all in all. " * 12

    def cached(client: openai.OpenAI, salt: str | None) -> int:
        body = {} if salt is None else {"cache_salt": salt}
        usage = client.completions.create(model="tiny", prompt=prompt, max_tokens=1, extra_body=body).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        return usage.prompt_tokens_details.cached_tokens or 0

    assert [cached(client, salt) > 0 for salt in ("a", None, "b", "", "a", "b", None, "")] == [False] * 4 + [True] * 4
    from npuq.serve.http.access import Access

    with running(Service(model, ["tiny"], SamplingParams(), access=Access.of(["key-1", "key-2"]))) as keyed:
        one, two = keyed.client(api_key="key-1"), keyed.client(api_key="key-2")
        assert [
            cached(each, salt) > 0 for each, salt in ((one, None), (two, None), (one, None), (two, "a"), (two, None))
        ] == [*(False, False, True, False, True)]


def test_defaults_are_those_of_the_server(model: LanguageModel) -> None:
    """Of the model's generation_config.json, that is; requests come before them."""
    params = SamplingParams(temperature=1.0, seed=5, top_k=3)
    with running(Service(model, ["tiny"], params, Limits())) as found, found.client() as client:
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12)
        assert answer.choices[0].text == model.generate(PROMPT, params, max_new_tokens=12).text
        answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
        assert answer.choices[0].text == model.generate(PROMPT, max_new_tokens=12, temperature=0).text


def test_sixteen_clients_get_each_its_own_text(client: openai.OpenAI, model: LanguageModel) -> None:
    """Streamed or not, greedy or seeded: as alone."""
    prompts = [f"Section {number}. The term" for number in range(16)]
    options = [{"temperature": 0.7 * (number % 2), "seed": number} for number in range(16)]
    expected = [
        model.generate(prompt, SamplingParams(max_new_tokens=20, **given)).text  # type: ignore[arg-type]
        for prompt, given in zip(prompts, options, strict=True)
    ]

    def ask(number: int) -> str:
        given = {"model": "tiny", "prompt": prompts[number], "max_tokens": 20, **options[number]}
        if number % 3:
            return str(client.completions.create(**given).choices[0].text)
        return "".join(chunk.choices[0].text for chunk in client.completions.create(**given, stream=True))

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(16))) == expected


def test_a_long_document_is_made_beside_the_event_loop(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities of a long prompt take seconds, in which no stream would go on."""
    on_the_loop: list[bool] = []
    whole = CompletionReply.whole

    def noted(self: CompletionReply, *given: Any) -> Any:
        on_the_loop.append(False)
        with suppress(RuntimeError):
            asyncio.get_running_loop()
            on_the_loop[-1] = True
        return whole(self, *given)

    monkeypatch.setattr(CompletionReply, "whole", noted)
    monkeypatch.setattr(responding, "_FEW_TOKENS", 20)
    for tokens in (10, 30):
        answer = server.complete(prompt=[5] * tokens, max_tokens=1, logprobs=1, echo=True)
        assert len(answer.json["choices"][0]["logprobs"]["tokens"]) == tokens + 1
    assert on_the_loop == [True, False]
