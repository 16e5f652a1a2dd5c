"""A conversation, as chat templates are given one by transformers (utils/chat_template_utils.py, 5.24)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from ..errors import GenerationError

Message: TypeAlias = Mapping[str, Any]

# The first is the name that templates read; `thinking` is read by those of gpt-oss.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
_MARK: Final = "NPUQ-CONTINUES-HERE "


def as_messages(conversation: str | Sequence[Message], system: str | None = None) -> list[dict[str, Any]]:
    """The messages of a conversation: a text is what a user says; `system` goes before all.

    GenerationError for anything but a text or a list of messages that begins otherwise than with a system message of
    its own where `system` is given.
    """
    if isinstance(conversation, str):
        conversation = [{"role": "user", "content": conversation}]
    if isinstance(conversation, Mapping) or not isinstance(conversation, Sequence):
        raise GenerationError(
            f"a conversation is a text or a list of messages, not a {type(conversation).__name__}; "
            'give [{"role": "user", "content": "…"}]'
        )
    messages = []
    for index, message in enumerate(conversation):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise GenerationError(f'messages[{index}] is no message; give {{"role": "user", "content": "…"}}')
        messages.append(dict(message))
    if not messages:
        raise GenerationError("the conversation is empty; give at least one message")
    if system is not None:
        if messages[0]["role"] == "system":
            raise GenerationError("the conversation begins with a system message already; give only one of the two")
        messages.insert(0, {"role": "system", "content": system})
    return messages


def check_variables(variables: Mapping[str, Any]) -> None:
    """GenerationError for template variables under names that mean something else to `Tokenizer.chat`."""
    taken = sorted(variables.keys() & {"messages", "system", "tools", "documents", "chat_template"})
    if taken:
        raise GenerationError(f"chat_template_kwargs: {', '.join(taken)} cannot be given there")


def render(
    messages: Sequence[dict[str, Any]],
    continue_final_message: bool | str,
    source: str,
    template: Callable[[list[dict[str, Any]]], str],
) -> str:
    """The text that `template`, of that source, makes of messages.

    Reasoning is found under each name that templates know. Fields that are None are left out, which most templates
    want; where that fails they are given as they are, because some (DeepSeek's) ask whether content is none.
    """
    present = [
        _with_reasoning({name: value for name, value in message.items() if value is not None}) for message in messages
    ]
    try:
        return _continued(present, continue_final_message, source, template)
    except GenerationError as error:
        given = [{**message, **some} for message, some in zip(messages, present, strict=True)]
        if given == present:
            raise
        try:
            return _continued(given, continue_final_message, source, template)
        except GenerationError:
            raise error from None


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _continued(
    messages: list[dict[str, Any]], field: bool | str, source: str, template: Callable[[list[dict[str, Any]]], str]
) -> str:
    """The rendered text, cut where the last message's field ends if that is to be continued."""
    if not field:
        return template(messages)
    name = field if isinstance(field, str) else "content"
    *before, last = messages
    names = [name]
    if name in _REASONING:
        names = [other for other in _REASONING if last.get(other) == last.get(name)]
    if last.get(name) is None:
        raise GenerationError(f"continue_final_message: the last message has no {name} to continue")
    if not any(other in source for other in names):
        raise GenerationError(f"continue_final_message: the chat template does not read {name}")
    text, marked = _mark(last[name], name)
    rendered = template([*before, {**last, **dict.fromkeys(names, marked)}])
    mark = _MARK.strip()
    if text.strip() not in rendered or mark not in rendered:
        raise GenerationError("continue_final_message: the chat template changes or leaves out the last message")
    place = rendered.rindex(mark)
    # Without the space after it, the template strips its texts: so is this one.
    return rendered[:place] if rendered.startswith(_MARK, place) else rendered[:place].rstrip()


def _mark(content: Any, name: str) -> tuple[str, Any]:
    """What is continued, and the content with a mark at its end: a text, or the last text among parts."""
    if isinstance(content, str):
        return content, content + _MARK
    if isinstance(content, (list, tuple)):
        for index in reversed(range(len(content))):
            part = content[index]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                marked = {**part, "text": part["text"] + _MARK}
                return part["text"], [*content[:index], marked, *content[index + 1 :]]
    raise GenerationError(f"continue_final_message: the last message's {name} holds no text to continue")
