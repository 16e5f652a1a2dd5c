"""Messages and template variables of a request, as chat templates take them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from ...inputs.printable import shown
from ..http.errors import bad_request
from .request import ChatMessage, ContentPart

_TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text"})
_RESERVED: Final = frozenset({"chat_template", "tokenize", "messages", "tools", "system", "documents"})
_ROLES: Final[Mapping[str, str]] = {"developer": "system"}


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a template. Raises ApiError for content that is no text."""
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    content = _text(message.content, where)
    given: dict[str, Any] = {"role": _ROLES.get(message.role, message.role), "content": content}
    if message.role == "assistant":
        if message.tool_calls:
            # DeepSeek-V3's template writes calls only of a message without content; clients also send an empty one.
            given["content"] = content or None
            given["tool_calls"] = [
                {
                    "id": call.id,
                    "type": call.type,
                    "function": {"name": call.function.name, "arguments": call.function.arguments},
                }
                for call in message.tool_calls
            ]
        reasoning = message.reasoning_content if message.reasoning_content is not None else message.reasoning
        if reasoning is not None:
            given |= {"reasoning_content": reasoning, "reasoning": reasoning}
    others = {"name": message.name, "tool_call_id": message.tool_call_id, "prefix": message.prefix}
    return {**given, **{name: value for name, value in others.items() if value is not None}}


def _text(content: str | list[ContentPart] | None, where: str) -> str:
    """The text of a content; texts of several parts in lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    for index, part in enumerate(content):
        if part.type not in _TEXT_PARTS or part.text is None:
            raise bad_request(
                f"{where}.content[{index}] is a part {shown(part.type)}: this server takes text alone", "messages"
            )
    return "\n".join(part.text or "" for part in content)


def template_variables(effort: str | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """Variables of a template. Models call thinking by one of two names, and reasoning_effort sets both.

    Raises ApiError for names that a request may not set.
    """
    variables: dict[str, Any] = {}
    if effort is not None:
        variables = {"reasoning_effort": effort, **dict.fromkeys(("thinking", "enable_thinking"), effort != "none")}
    refused = sorted(name for name in given or {} if name in _RESERVED or "__" in name)
    if refused:
        raise bad_request(
            f"chat_template_kwargs: {shown(refused[0])} cannot be set by a request", "chat_template_kwargs"
        )
    return {**variables, **(given or {})}
