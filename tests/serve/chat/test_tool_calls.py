"""Tool calls by the official client: streamed and whole, scripted and by grammar, over several turns."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from npuq.serve import engine_thread

from .chat_models import COMPACT, DEEPSEEK, KIMI, MARKERS, ScriptedConversations
from .test_chat import THINKING

WEATHER = {
    "type": "object",
    "properties": {"place": {"type": "string", "maxLength": 12}, "unit": {"enum": ["C", "F"]}},
    "required": ["place", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Of a place.", "parameters": WEATHER, "strict": True},
    },
    {
        "type": "function",
        "function": {
            "name": "stop",
            "description": "",
            "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
            "strict": True,
        },
    },
]
ASK: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Weather?"}], "tools": TOOLS}
BEGIN, END, CALL, CALL_END, SEP = DEEPSEEK
COLOGNE = '{"place": "Köln 🌧", "unit": "C"}'
TWO_CALLS = f"I look.{BEGIN}{CALL}weather{SEP}{COLOGNE}{CALL_END}{CALL}stop{SEP}{{}}{CALL_END}{END}"


def test_two_calls_in_one_message(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say(f"hm</think>{TWO_CALLS}")
    choice = chat.chat.completions.create(**ASK, extra_body=THINKING).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("I look.", "tool_calls")
    calls = choice.message.tool_calls or []
    assert [(call.type, call.function.name, call.function.arguments) for call in calls] == [  # type: ignore[union-attr]
        ("function", "weather", COLOGNE),
        ("function", "stop", "{}"),
    ]
    assert len({call.id for call in calls}) == 2 and all(call.id.startswith("call_") for call in calls)


def test_the_clients_stream_helper_assembles_two_calls(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say(TWO_CALLS)
    kinds = set()
    with chat.chat.completions.stream(**ASK) as stream:
        for event in stream:
            kinds.add(event.type)
        final = stream.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in calls] == [("weather", COLOGNE), ("stop", "{}")]
    assert calls[0].function.parsed_arguments == json.loads(COLOGNE)
    assert final.choices[0].finish_reason == "tool_calls" and final.choices[0].message.content == "I look."
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done", "content.done"} <= kinds


def test_deltas_of_a_call(chat: openai.OpenAI, script: ScriptedConversations, monkeypatch: pytest.MonkeyPatch) -> None:
    """Id, type and name once and first; arguments in pieces; an index in each, and whole characters."""
    monkeypatch.setattr(engine_thread, "_GATHER_SECONDS", 0.0)  # a piece a token
    script.say(TWO_CALLS)
    deltas = [
        call
        for chunk in chat.chat.completions.create(**ASK, stream=True)
        for call in chunk.choices[0].delta.tool_calls or []
    ]
    first = [delta for delta in deltas if delta.id is not None]
    assert [(delta.index, delta.type, delta.function and delta.function.name) for delta in first] == [
        (0, "function", "weather"),
        (1, "function", "stop"),
    ]
    assert [delta.function and delta.function.arguments for delta in first] == ["", ""]
    pieces = [delta.function.arguments or "" for delta in deltas if delta.index == 0 and delta.function]
    assert "".join(pieces) == COLOGNE and not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) > 1
    assert [delta.index for delta in deltas] == sorted(delta.index for delta in deltas)


def test_a_malformed_call_is_content(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    counted = script._model and _malformed(chat)
    script.say(f"{BEGIN}{CALL}the weather{SEP}{{}}{CALL_END}{END}")
    choice = chat.chat.completions.create(**ASK).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("the weather{}", "stop")
    assert choice.message.tool_calls is None and _malformed(chat) == counted + 1


def _malformed(chat: openai.OpenAI) -> float:
    page = chat._client.get(f"{str(chat.base_url).removesuffix('/v1/')}/metrics").text
    return float(
        next(line for line in page.splitlines() if line.startswith("npuq_malformed_tool_calls_total")).split()[1]
    )


def test_no_tools_no_calls(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    """With tool_choice "none" the prompt has no tools; what looks like a call is content without its markers."""
    script.say(TWO_CALLS)
    choice = chat.chat.completions.create(**ASK, tool_choice="none").choices[0]
    assert choice.message.tool_calls is None and choice.finish_reason == "stop"
    assert choice.message.content == f"I look.weather{COLOGNE}stop{{}}"
    assert "Of a place." not in script.prompt
    assert not any(marker in choice.message.content for marker in MARKERS)


def test_one_call_where_one_is_allowed(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say(TWO_CALLS)
    choice = chat.chat.completions.create(**ASK, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls or []] == ["weather"]  # type: ignore[union-attr]
    assert choice.finish_reason == "tool_calls"


def test_the_next_turn_has_the_calls_and_what_they_gave(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say(TWO_CALLS)
    message = chat.chat.completions.create(**ASK).choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": text}
        for call, text in zip(message.tool_calls or [], ("wet", "stopped"), strict=True)
    ]
    for content in ("I look.", "", None):  # clients send either for a message without content
        script.say("Take a coat.")
        turn = {**message.to_dict(), "content": content}
        answer = chat.chat.completions.create(**{**ASK, "messages": [*ASK["messages"], turn, *results]})
        assert answer.choices[0].message.content == "Take a coat."
        called = f"{content or ''}{TWO_CALLS.removeprefix('I look.')}"
        assert f"User: Weather?\nAssistant: </think>{called}\nOutput: wet\nOutput: stopped" in script.prompt


@pytest.mark.parametrize("absent", [{}, {"description": None, "parameters": None}])
def test_tools_without_a_description(
    chat: openai.OpenAI, script: ScriptedConversations, absent: dict[str, None]
) -> None:
    """DeepSeek-V3.1's template fails without one. Null is a field left out."""
    script.say("ok")
    tool: Any = {"type": "function", "function": {"name": "f", **absent}}
    chat.chat.completions.create(**{**ASK, "tools": [tool]})
    assert '\nf:  {"type": "object", "properties": {}}' in script.prompt


# ---- by grammar ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_comes(chat: openai.OpenAI, choice: Any) -> None:
    """The example would never call by itself."""
    answer = chat.chat.completions.create(
        **ASK, **COMPACT, tool_choice=choice, parallel_tool_calls=False, max_tokens=80
    ).choices[0]
    (call,) = answer.message.tool_calls or []
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    assert call.type == "function" and call.function.name in ("weather", "stop")
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert set(arguments) == {"place", "unit"} and arguments["unit"] in "CF" and len(arguments["place"]) <= 12
    else:
        assert choice == "required" and arguments == {}


def test_a_required_call_behind_reasoning(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    script.say("hm</think>", goes_on=True)
    answer = chat.chat.completions.create(
        **ASK, **COMPACT, tool_choice="required", parallel_tool_calls=False, max_tokens=80, extra_body=THINKING
    ).choices[0]
    assert answer.message.model_extra and answer.message.model_extra["reasoning"] == "hm"
    assert len(answer.message.tool_calls or []) == 1 and answer.message.content is None


def test_strict_arguments_once_a_call_has_begun(chat: openai.OpenAI, script: ScriptedConversations) -> None:
    """With tool_choice "auto" the text is free; behind the marker the arguments of a strict tool satisfy its schema."""
    script.say(f"I look.{BEGIN}{CALL}weather{SEP}", goes_on=True)
    choice = chat.chat.completions.create(**ASK, **COMPACT, max_tokens=80, parallel_tool_calls=False).choices[0]
    assert choice.message.content == "I look."
    (call,) = choice.message.tool_calls or []
    assert json.loads(call.function.arguments)["unit"] in "CF"  # type: ignore[union-attr]


# ---- Kimi-K2 ---------------------------------------------------------------------------------------------------------


def kimi_calls(*calls: tuple[str, str]) -> str:
    begin, end, call, call_end, argument = KIMI
    return begin + "".join(f"{call}{id}{argument}{arguments}{call_end}" for id, arguments in calls) + end


def test_kimis_ids_go_round_verbatim(kimi: openai.OpenAI, kimi_script: ScriptedConversations) -> None:
    calls = kimi_calls(("functions.weather:4", COLOGNE), ("functions.stop:9", "{}"))
    kimi_script.say(calls)
    with kimi.chat.completions.stream(**ASK) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [call.id for call in message.tool_calls or []] == ["functions.weather:4", "functions.stop:9"]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "ok"} for call in message.tool_calls or []]
    turn = {"role": "assistant", "content": None, "tool_calls": [call.to_dict() for call in message.tool_calls or []]}
    kimi_script.say("ok")
    kimi.chat.completions.create(**{**ASK, "messages": [*ASK["messages"], turn, *results]})
    assert f"assistant: {calls}\n" in kimi_script.prompt
    assert "Return of functions.stop:9: ok" in kimi_script.prompt


def test_kimis_numbers_go_on_over_the_conversation(kimi: openai.OpenAI) -> None:
    """A required call has the next number of the whole conversation."""

    def call(number: int) -> dict[str, Any]:
        return {"id": f"functions.stop:{number}", "type": "function", "function": {"name": "stop", "arguments": "{}"}}

    messages = [
        *ASK["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call(0), call(1)]},
        *({"role": "tool", "tool_call_id": f"functions.stop:{number}", "content": "ok"} for number in (0, 1)),
        {"role": "user", "content": "Again."},
    ]
    forced: Any = {"type": "function", "function": {"name": "stop"}}
    asked: dict[str, Any] = {**ASK, "messages": messages, "tool_choice": forced, "parallel_tool_calls": False}
    (found,) = kimi.chat.completions.create(**asked, max_tokens=60).choices[0].message.tool_calls or []
    assert found.id == "functions.stop:2"
