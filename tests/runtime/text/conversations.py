"""Conversations and settings that chat templates are tried with."""

from __future__ import annotations

from typing import Any

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <of> a place & a day",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "A town: «Köln», 東京"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "unit": {"type": ["string", "number"]},
            },
            "required": ["place"],
        },
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": {"place": "Köln", "days": [1, 2]}},
}
USER = {"role": "user", "content": "  What is 2 + 2?\n"}

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "a question": [USER],
    "a system prompt": [{"role": "system", "content": "Be brief. 🐋"}, USER],
    "several turns": [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n 4 \n"},
        {"role": "user", "content": 'And "3"?'},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Sure?"},
    ],
    "an answer at the end": [USER, {"role": "assistant", "content": "Four, ", "reasoning": "2 and 2"}],
    "no alternation": [USER, USER],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "ask", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": '{"sky": "grey"}'},
        {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "12 °C"},
    ],
    "calls without content": [
        {"role": "user", "content": "Weather?", "name": None},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call00001", "content": "grey"},
        {"role": "assistant", "content": "It is grey.", "tool_calls": None},
        {"role": "user", "content": "Thanks"},
    ],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "text", "text": "here"}]}],
}

DOCUMENTS = [{"title": "One", "text": "1 < 2"}, {"title": "Zwei", "text": "größer"}]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no generation prompt": {"add_generation_prompt": False},
    "tools": {"tools": [WEATHER, WEATHER]},
    "documents": {"documents": DOCUMENTS, "controls": {"citations": True}},
    "thinking": {"thinking": True, "enable_thinking": True, "reasoning_effort": "high"},
    "no thinking": {"thinking": False, "enable_thinking": False, "extra": [1, 2.5, None, True, {"a": "b"}]},
    "a special token of one's own": {"bos_token": "<s>", "date_string": "1 May 2024"},
}
