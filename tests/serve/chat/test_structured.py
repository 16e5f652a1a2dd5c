"""Structured output by the official client: what the example writes satisfies it, or the request fails."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from .chat_models import COMPACT, ScriptedConversations
from .test_chat import ASK, THINKING

SCHEMA = {
    "type": "object",
    "properties": {
        "sky": {"enum": ["grey", "blue"]},
        "degrees": {"type": "integer", "minimum": -40, "maximum": 60},
    },
    "required": ["sky", "degrees"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "weather", "schema": SCHEMA, "strict": True}}


class Weather(BaseModel):
    """The same as a client's class."""

    sky: Literal["grey", "blue"]
    degrees: int


def check(text: str | None) -> None:
    found = json.loads(text or "")
    assert set(found) == {"sky", "degrees"} and found["sky"] in ("grey", "blue") and -40 <= found["degrees"] <= 60


@pytest.mark.parametrize("options", [{}, {"n": 2, "temperature": 1.5, "seed": 1}])
def test_a_schema_is_satisfied(chat: openai.OpenAI, options: dict[str, Any]) -> None:
    answer = chat.chat.completions.create(**ASK, **COMPACT, response_format=FORMAT, max_tokens=80, **options)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        check(choice.message.content)


def test_a_class_as_the_schema(chat: openai.OpenAI) -> None:
    answer = chat.chat.completions.parse(
        **ASK, **COMPACT, response_format=Weather, max_tokens=80, temperature=1, seed=5
    )
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_an_object_of_any_kind(chat: openai.OpenAI) -> None:
    """It begins as one at least: the example may not find the end."""
    answer = chat.chat.completions.create(**ASK, **COMPACT, response_format={"type": "json_object"}, max_tokens=40)
    choice = answer.choices[0]
    assert (choice.message.content or "").startswith("{")
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content or ""), dict)


@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_behind_reasoning(chat: openai.OpenAI, script: ScriptedConversations, stream: bool) -> None:
    """The reasoning is free, and no JSON ends up in it."""
    script.say("It is {wet}.</think>", goes_on=True)
    asked: dict[str, Any] = {**ASK, **COMPACT, "response_format": FORMAT, "max_tokens": 80, "extra_body": THINKING}
    if stream:
        deltas = [chunk.choices[0].delta for chunk in chat.chat.completions.create(**asked, stream=True)]
        reasoning = "".join((delta.model_extra or {}).get("reasoning", "") for delta in deltas)
        content = "".join(delta.content or "" for delta in deltas)
    else:
        message = chat.chat.completions.create(**asked).choices[0].message
        reasoning, content = (message.model_extra or {})["reasoning"], message.content or ""
    assert reasoning == "It is {wet}."
    check(content)


def test_reasoning_may_begin_by_itself(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    """Where the template neither begins nor ends it. The script then only says what the grammar allows."""
    prefill = {"chat_template_kwargs": {"add_generation_prompt": False}}
    script.say("<think>hm</think>", goes_on=True)
    asked: dict[str, Any] = {**ASK, **COMPACT, "response_format": FORMAT, "max_tokens": 80, "extra_body": prefill}
    check(chat.chat.completions.create(**asked).choices[0].message.content)
    # Behind the end of reasoning it cannot begin again.
    script.say("<think>hm</think>", goes_on=True)
    with pytest.raises(openai.InternalServerError, match="the grammar of this request cannot go on"):
        chat.with_options(max_retries=0).chat.completions.create(**{**asked, "extra_body": {}})


def test_the_end_within_reasoning_is_not_allowed(chat: openai.OpenAI) -> None:
    """The reply would have no content: even where the model wants to end at once, it goes on."""
    bias = {"1": 100}
    choice = chat.chat.completions.create(
        **ASK, response_format=FORMAT, max_tokens=8, logit_bias=bias, extra_body=THINKING
    ).choices[0]
    assert choice.finish_reason == "length"


def test_a_dead_end_is_an_error(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    """A reply outside of its grammar never comes back as if it were one; the next request is served."""
    script.say("no JSON", goes_on=True)
    with pytest.raises(openai.InternalServerError, match="the grammar of this request cannot go on"):
        chat.with_options(max_retries=0).chat.completions.create(**ASK, **COMPACT, response_format=FORMAT)
    script.say("no JSON", goes_on=True)
    with pytest.raises(openai.APIError, match="the grammar of this request cannot go on"):
        list(chat.chat.completions.create(**ASK, **COMPACT, response_format=FORMAT, stream=True))
    script.say("ok")
    assert chat.chat.completions.create(**ASK).choices[0].message.content == "ok"


def test_a_schema_or_a_call(chat: openai.OpenAI) -> None:
    """With tools beside a schema, the reply is one or the other."""
    tool: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    answer = chat.chat.completions.create(
        **ASK, **COMPACT, response_format=FORMAT, tools=[tool], parallel_tool_calls=False, max_tokens=80
    )
    message = answer.choices[0].message
    if message.tool_calls:
        assert message.content is None
    else:
        check(message.content)
