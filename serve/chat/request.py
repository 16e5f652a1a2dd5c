"""The body of a chat request."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from ..fields import SamplingFields
from ..limits import MOST_TOOLS, MOST_TOP_LOGPROBS

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]


class ContentPart(msgspec.Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct):
    """Name and arguments of a call; arguments are text."""

    name: str
    arguments: str | dict[str, Any] = ""


class MessageCall(msgspec.Struct):
    """A tool call of an assistant's message."""

    id: str
    function: CalledFunction
    type: Literal["function"] = "function"


class ChatMessage(msgspec.Struct):
    """A message. Fields that it does not name are ignored."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    prefix: bool | None = None


class Function(msgspec.Struct):
    """A function that the model may call. parameters: JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(msgspec.Struct):
    """A tool of a request."""

    function: Function
    type: Literal["function"] = "function"


class ChosenFunction(msgspec.Struct):
    name: str


class ToolChoice(msgspec.Struct):
    """The choice of one function."""

    function: ChosenFunction
    type: Literal["function"] = "function"


class JsonSchema(msgspec.Struct):
    """A schema of a response format; it is enforced whatever `strict` says."""

    schema: dict[str, Any] | None = None
    name: str | None = None


class ResponseFormat(msgspec.Struct):
    """The form that the content must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class ChatRequest(SamplingFields, kw_only=True):
    """The body. Fields that it does not name are ignored, except those that would change the answer's meaning."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    # As they came, for the template.
    tools: Annotated[list[dict[str, Any]], msgspec.Meta(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str, msgspec.Meta(max_length=32)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # Refused where they are given.
    chat_template: Any = None
    functions: Any = None
    function_call: Any = None
    echo: Any = None
    best_of: Any = None
    suffix: Any = None
