"""`/v1/chat/completions` by the official client: messages, reasoning, choices, log-probabilities."""

from __future__ import annotations

import json
import re
import threading
import urllib.request
from typing import Any

import openai
import pytest

from npuq.errors import GenerationError
from npuq.runtime import LanguageModel

from ..conftest import Running
from .chat_models import ScriptedConversations

ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Why?"}]}
THINKING = {"chat_template_kwargs": {"thinking": True}}


def test_an_answer_is_the_models_own(chat: openai.OpenAI, chat_model: LanguageModel) -> None:
    expected = chat_model.chat("Why?", max_new_tokens=12, temperature=0)
    answer = chat.chat.completions.create(**ASK, max_completion_tokens=12, max_tokens=1)
    (choice,) = answer.choices
    assert (choice.message.content, choice.finish_reason) == (expected.text, expected.finish_reason)
    assert choice.message.role == "assistant" and choice.message.tool_calls is None
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 12)


def test_a_streams_chunks_come_in_order(chat: openai.OpenAI, chat_model: LanguageModel) -> None:
    expected = chat_model.chat("Why?", max_new_tokens=12, temperature=0)
    options = {"include_usage": True}
    chunks = list(chat.chat.completions.create(**ASK, max_tokens=12, stop=["zq"], stream=True, stream_options=options))
    first, *deltas, finish, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", None)
    assert all(chunk.choices[0].delta.content for chunk in deltas)  # none is empty
    assert "".join(chunk.choices[0].delta.content or "" for chunk in deltas) == expected.text
    assert finish.choices[0].finish_reason == "length" and finish.choices[0].delta.content is None
    assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens == 12
    assert {(chunk.id, chunk.created, chunk.object) for chunk in chunks} == {
        (first.id, first.created, "chat.completion.chunk")
    }


def test_messages_in_all_their_forms(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("ok")
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}], "name": "me"},
        {"role": "assistant", "content": "Three", "reasoning_content": "hm", "refusal": None},
        {"role": "user", "content": "東京 🐋"},
    ]
    answer = chat.chat.completions.create(model="tiny", messages=messages, extra_body={"metadata": {"a": "b"}})
    assert answer.choices[0].message.content == "ok" and answer.choices[0].finish_reason == "stop"
    assert script.prompt == ("Be brief.\nUser: One\ntwo\nAssistant: </think>Three\nUser: 東京 🐋\nAssistant: </think>")


# ---- reasoning -------------------------------------------------------------------------------------------------------


def test_reasoning_has_two_names(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("Let me\nsee. 🐋\n</think>\n\nBecause.")
    answer = chat.chat.completions.create(**ASK, extra_body=THINKING)
    message = answer.choices[0].message
    assert message.content == "Because."
    assert message.model_extra == {"reasoning_content": "Let me\nsee. 🐋", "reasoning": "Let me\nsee. 🐋"}
    assert answer.usage is not None and answer.usage.completion_tokens_details is not None
    reasoning = answer.usage.completion_tokens_details.reasoning_tokens
    assert reasoning is not None and 5 < reasoning < answer.usage.completion_tokens


def test_reasoning_and_content_share_no_delta(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("<think>Let me see.</think>Because.")  # the template has closed it, and the model opens it again
    chunks = list(chat.chat.completions.create(**ASK, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    extra = [delta.model_extra or {} for delta in deltas]
    assert "".join(each.get("reasoning_content", "") for each in extra) == "Let me see."
    assert "".join(each.get("reasoning", "") for each in extra) == "Let me see."
    assert "".join(delta.content or "" for delta in deltas) == "Because."
    assert not any(delta.content and each for delta, each in zip(deltas, extra, strict=True))


def test_a_reply_that_ends_inside_reasoning(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("Let me see. It is a long way.</think>Because.")
    choice = chat.chat.completions.create(**ASK, extra_body=THINKING, max_tokens=4).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("", "length")
    assert choice.message.model_extra and choice.message.model_extra["reasoning"].startswith("Let me")


@pytest.mark.parametrize(
    ("options", "end"),
    [
        ({}, "</think>"),
        ({"reasoning_effort": "high"}, "<think>"),
        ({"reasoning_effort": "none"}, "</think>"),
        ({"reasoning_effort": "none", "extra_body": THINKING}, "<think>"),
    ],
)
def test_the_effort_sets_the_templates_variables(
    chat: openai.OpenAI, script: ScriptedConversations, options: dict[str, Any], end: str
) -> None:
    script.say("ok")
    chat.chat.completions.create(**ASK, **options)
    assert script.prompt.endswith(f"Assistant: {end}")


def test_a_stop_string_is_of_the_content(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("One two three</think>\n\nOne two three")
    choice = chat.chat.completions.create(**ASK, extra_body=THINKING, stop=[" two", "\n\n"], logprobs=True).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("One", "stop")
    assert choice.message.model_extra and choice.message.model_extra["reasoning"] == "One two three"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert "".join(entry.token for entry in choice.logprobs.content) == "One"


def test_the_librarys_chat_has_the_same_parts(chat_model: LanguageModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0}
    prompt = chat_model.tokenizer.chat("Why?", chat_template_kwargs={"thinking": True})
    raw = chat_model.generate(prompt, **options)
    thought = chat_model.chat("Why?", chat_template_kwargs={"thinking": True}, **options)
    assert (thought.text, thought.reasoning, thought.reasoning_tokens) == ("", raw.text.strip(), 8)
    assert thought.token_ids == raw.token_ids and thought.finish_reason == "length"
    with pytest.raises(GenerationError, match="n above 1"):
        chat_model.chat("Why?", n=2)


# ---- choices and log-probabilities -----------------------------------------------------------------------------------


def test_choices_of_one_request(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("one", "<think>hm</think>two")
    answer = chat.chat.completions.create(**ASK, n=2)
    assert [(choice.index, choice.message.content) for choice in answer.choices] == [(0, "one"), (1, "two")]
    script.say("one", "<think>hm</think>two")
    texts = {0: "", 1: ""}
    roles = []
    for chunk in chat.chat.completions.create(**ASK, n=2, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        roles += [choice.index] if choice.delta.role else []
    assert texts == {0: "one", 1: "two"} and roles == [0, 1]


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_have_the_tokens_own_bytes(chat: openai.OpenAI, script: ScriptedConversations, stream: bool) -> None:
    """Also where a token is a part of a character; of content alone."""
    script.say("Hm.</think>東京 🐋!")
    asked = chat.chat.completions.create(**ASK, extra_body=THINKING, logprobs=True, top_logprobs=3, stream=stream)
    found = [choice for part in (asked if stream else [asked]) for choice in part.choices]
    entries = [entry for choice in found if choice.logprobs for entry in choice.logprobs.content]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == "東京 🐋!"
    assert any(entry.token == "\N{REPLACEMENT CHARACTER}" for entry in entries)
    assert all(len(entry.top_logprobs) == 3 and entry.logprob < 0 for entry in entries)


def test_token_ids_for_those_who_ask(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("ok")
    answer = chat.chat.completions.create(**ASK, extra_body={"return_token_ids": True})
    tokenizer = script.tokenizer
    assert answer.model_extra and tokenizer.decode(answer.model_extra["prompt_token_ids"]) == script.prompt
    assert answer.choices[0].model_extra
    assert answer.choices[0].model_extra["token_ids"] == [*tokenizer.encode("ok", special=False), tokenizer.eos_id]


# ---- templates -------------------------------------------------------------------------------------------------------


def test_text_of_a_request_is_no_template(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    """Neither in messages nor in tools and variables: a template reads them as data."""
    code = "{{ 7 * 7 }}{% for i in range(9) %}x{% endfor %}"
    tool = {"type": "function", "function": {"name": "f", "description": code, "parameters": {"description": code}}}
    script.say("ok")
    chat.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": code}],
        tools=[tool],
        extra_body={"chat_template_kwargs": {"other": code}},
    )
    assert script.prompt.count("{{ 7 * 7 }}") == 3 and "49" not in script.prompt and "xx" not in script.prompt


def test_the_server_answers_while_a_template_runs(
    chat: openai.OpenAI, chat_server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template without end: the request is refused at the limit, and `/health` answers meanwhile."""
    tokenizer = chat_server.service.model.tokenizer
    endless = tokenizer.templates["default"].__class__(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "endless"
    )
    monkeypatch.setattr(tokenizer, "_templates", {"default": endless})
    monkeypatch.setattr(tokenizer._renderer, "_seconds", 1.5)
    began = []
    render = tokenizer._renderer.render
    monkeypatch.setattr(tokenizer._renderer, "render", lambda *given: (began.append(1), render(*given))[1])
    refused = pytest.raises(openai.BadRequestError, match=r"it takes more than 1\.5 seconds")
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with refused, _health_in_between(chat_server.url) as answers:
        chat.chat.completions.create(**ASK, tools=[tool])
    assert len(answers) > 2 and set(answers) == {200}
    assert len(began) == 1  # not again with a description, as where a template fails


class _health_in_between:  # noqa: N801  (a context manager)
    """Asks for `/health` again and again until it ends."""

    def __init__(self, url: str):
        self._url, self._ended, self.answers = url, threading.Event(), []
        self._thread = threading.Thread(target=self._ask)

    def _ask(self) -> None:
        while not self._ended.wait(0.1):
            with urllib.request.urlopen(f"{self._url}/health", timeout=60) as answer:
                self.answers.append(answer.status)

    def __enter__(self) -> list[int]:
        self._thread.start()
        return self.answers

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()


# ---- refusals --------------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Why?"}
TOOL = {"type": "function", "function": {"name": "f"}}


def schema(value: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        inner = {"type": "array", "items": inner}
    return inner


@pytest.mark.parametrize(
    ("changes", "message", "param"),
    [
        ({"messages": []}, "length >= 1", "messages"),
        ({"messages": [{"role": "user"}] * 5000}, "5000 messages have more tokens than", "messages"),
        ({"messages": [{"role": "function", "content": "a"}]}, "Invalid enum value 'function'", "messages"),
        ({"messages": [{"content": "a"}]}, "missing required field `role`", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            r"messages\[0\]\.content\[0\] is a part 'image_url': this server takes text alone",
            "messages",
        ),
        ({"chat_template": "{{ 1 }}"}, "chat_template is the server's", "chat_template"),
        *(
            ({"chat_template_kwargs": {name: "x"}}, f"'{name}' cannot be set by a request", "chat_template_kwargs")
            for name in ("chat_template", "tokenize", "messages", "tools", "__class__", "a__b")
        ),
        ({"chat_template_kwargs": {"a": nested(300)}}, "nested|levels", None),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": nested(300)}}]},
            "nested|levels",
            None,
        ),
        ({"reasoning_effort": "x" * 33}, "length <= 32", "reasoning_effort"),
        ({"n": 5_000_000}, "n 5000000 is above 16", "n"),
        ({"logprobs": True, "top_logprobs": 10**9}, "<= 20", "top_logprobs"),
        ({"top_logprobs": 2}, "needs logprobs: true", "top_logprobs"),
        ({"logit_bias": {"4096": 1}}, "outside the model's vocabulary", None),
        ({"functions": []}, "functions is not served", "functions"),
        ({"echo": True}, "echo is not a field of chat", "echo"),
        ({"best_of": 3}, "best_of is not served", "best_of"),
        ({"response_format": {"type": "xml"}}, "Invalid enum value 'xml'", "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema has no schema", "response_format"),
        (schema({"type": "nothing"}), "the JSON schema cannot be used: Invalid type: nothing", "response_format"),
        (schema({"type": "string", "pattern": "("}), "unclosed group", "response_format"),
        (schema({"type": "string", "pattern": "(?=a)b"}), "look-around", "response_format"),
        (schema({"$ref": "#/none"}), "does not exist", "response_format"),
        (schema({"anyOf": []}), "Unsatisfiable schema", "response_format"),
        (schema({"type": "object", "properties": 3}), "properties must be an object", "response_format"),
        (schema({"$ref": "#"}), "the grammar of the reply cannot be used", "response_format"),
        (schema({"enum": ["x" * 70_000]}), "longer than 65536 characters", "response_format"),
        (schema(nested(400)), "cannot be used|nested too deeply", "response_format"),
        ({**schema({"type": "object"}), "ignore_eos": True}, "contradict", "response_format"),
        ({"tools": [{"type": "web_search"}]}, "tools: ", "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools: ", "tools"),
        ({"tools": [TOOL, TOOL]}, "two have the same name", "tools"),
        ({"tools": [TOOL] * 129}, "length <= 128", "tools"),
        ({"tool_choice": "required"}, "the request has none", "tool_choice"),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "none of tools",
            "tool_choice",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/none"}}}],
                "tool_choice": "required",
            },
            "the schema of tool f cannot be used",
            "tools",
        ),
    ],
)
def test_bad_requests_are_refused_before_the_queue(
    chat_server: Running, changes: dict[str, Any], message: str, param: str | None
) -> None:
    status, answer = post(chat_server, {"messages": [USER], **changes})
    error = answer["error"]
    assert status == 400 and re.search(message, error["message"]), error
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_a_template_that_fails_does_not_say_where_it_lies(chat_server: Running) -> None:
    answer = chat_server.ask("POST", "/v1/chat/completions", {**ASK, "chat_template_kwargs": {"namespace": 1}})
    assert answer.status == 400
    assert answer.error["message"].startswith("the chat template failed: ")


def test_a_body_nested_without_end(chat_server: Running) -> None:
    text = '{"chat_template_kwargs": {"a": ' + "[" * 100_000
    status, answer = post(chat_server, text.encode())
    assert status == 400 and "nested too deeply" in answer["error"]["message"]


def test_after_all_that_the_server_answers(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("ok")
    assert chat.chat.completions.create(**ASK).choices[0].message.content == "ok"


def post(server: Running, body: dict[str, Any] | bytes) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/v1/chat/completions", data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
