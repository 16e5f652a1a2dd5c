"""Bodies of chat requests with any value in any field: an answer, or a refusal in one line, and never a fault."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from npuq.serve.chat.request import ChatRequest

from ..conftest import Running
from .test_chat import post

FIELDS = sorted(
    set(msgspec.structs.asdict(msgspec.convert({"messages": [{"role": "user"}]}, ChatRequest))) - {"stream"}
)
WORDS = ["role", "content", "type", "text", "function", "name", "parameters", "tool_calls", "arguments", "id", "schema"]
WORDS += [
    "user",
    "assistant",
    "tool",
    "none",
    "auto",
    "required",
    "json_schema",
    "json_object",
    "object",
    "$ref",
    "#",
    "",
]
LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS) | st.text(max_size=4)
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer"])},
        optional={name: VALUES for name in ("content", "tool_calls", "reasoning", "name", "tool_call_id", "prefix")},
    ),
    max_size=3,
)
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": []}, "strict": True}
TOOLS = [{"type": "function", "function": FUNCTION}]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3), messages=st.none() | MESSAGES)
@example(changes={"tools": TOOLS, "tool_choice": "required"}, messages=None)
@example(
    changes={"tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#"}}}]}, messages=None
)
@example(changes={"chat_template_kwargs": {"bos_token": 3, "messages": []}}, messages=None)
@example(changes={"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, messages=None)
@example(changes={"seed": 2**63}, messages=None)
@example(changes={"stop": "\ud800"}, messages=None)
def test_any_value_of_any_field(chat_server: Running, changes: dict[str, Any], messages: Any) -> None:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], **changes, "max_tokens": 1}
    body.pop("max_completion_tokens", None)
    if messages is not None:
        body["messages"] = messages
    status, answer = post(chat_server, body)
    if status == 200:
        assert answer["choices"] and answer["usage"]["completion_tokens"] >= 1
        return
    message = answer["error"]["message"]
    assert status in (400, 404) and message and "\n" not in message and "internal error" not in message, (
        status,
        answer,
    )
