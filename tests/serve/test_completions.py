"""`/v1/completions` by the official client, over a real socket."""

from __future__ import annotations

import openai

from npuq.runtime import LanguageModel

PROMPT = "The quick brown"


def test_a_text_is_the_models_own(client: openai.OpenAI, model: LanguageModel) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16)
    expected = model.generate(PROMPT, max_new_tokens=16, temperature=0)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == expected.completion_tokens
    assert answer.usage.prompt_tokens == expected.prompt_tokens


def test_a_stream_has_the_same_text(client: openai.OpenAI, model: LanguageModel) -> None:
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(model="tiny", prompt=PROMPT, max_tokens=16, stream=True, stream_options=options)
    )
    expected = model.generate(PROMPT, max_new_tokens=16, temperature=0)
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == expected.text
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["tiny"]
    assert client.models.retrieve("w4a8").id == "w4a8"
