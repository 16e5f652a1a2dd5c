"""The tools of a request: which are offered, and whether one must be called."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from ...inputs.printable import error_line, shown
from ...runtime.text.replies.tools import Tool
from ..http.errors import bad_request
from .request import ChatRequest, ToolChoice, ToolSpec


@dataclass(frozen=True)
class Offer:
    """Tools of a request.

    shown: those that the prompt describes, as they came. callable: those that the reply may call. calls: "none",
    "allowed" or "required".
    """

    shown: Sequence[dict[str, Any]] = ()
    callable: Sequence[Tool] = ()
    calls: str = "none"


def offer(request: ChatRequest) -> Offer:
    """The tools of a request. Raises ApiError for malformed ones, and for a choice among those that are not there."""
    choice = request.tool_choice
    tools = _tools(request.tools or ())
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice names a tool, and the request has none", "tool_choice")
        return Offer()
    if choice == "none":
        return Offer()
    given = request.tools or ()
    if not isinstance(choice, ToolChoice):
        return Offer(given, tools, "required" if choice == "required" else "allowed")
    named = [tool for tool in tools if tool.name == choice.function.name]
    if not named:
        raise bad_request(f"tool_choice names {shown(choice.function.name)}, which is none of tools", "tool_choice")
    return Offer(given, named, "required")


def described(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same tools with an empty description and empty parameters where they have none, or null."""
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return [
        {
            **tool,
            "function": {**empty, **{name: value for name, value in tool["function"].items() if value is not None}},
        }
        for tool in tools
    ]


def _tools(given: Sequence[dict[str, Any]]) -> list[Tool]:
    try:
        specs = msgspec.convert(list(given), list[ToolSpec])
    except msgspec.ValidationError as error:
        raise bad_request(f"tools: {error_line(error)}", "tools") from None
    functions = [spec.function for spec in specs]
    tools = [Tool(each.name, each.parameters or {}, bool(each.strict)) for each in functions]
    if len({tool.name for tool in tools}) < len(tools):
        raise bad_request("tools: two have the same name", "tools")
    return tools
