"""Rendering of conversations by chat templates, as transformers does it (utils/chat_template_utils.py, 5.24)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias, TypedDict

from ...choices import TEMPLATE_ARGUMENTS
from ...errors import GenerationError
from ...inputs.printable import printable, shown

Message: TypeAlias = Mapping[str, Any]

# The first is the name that templates read; `thinking` is read by those of gpt-oss.
_REASONING: Final = ("reasoning_content", "thinking", "reasoning")
_MEDIA: Final = ("image", "video", "audio")
_MARK: Final = "NPUQ-CONTINUES-HERE "
# Kimi-K2.5's own code writes the tools as declarations of TypeScript. Its template takes JSON without them, which the
# model was not trained on.
_COMPUTED: Final = "tools_ts_str"


class ChatOptions(TypedDict, total=False):
    """Keyword arguments of `Tokenizer.chat` beside the messages."""

    system: str | None
    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template: str | None
    add_generation_prompt: bool
    continue_final_message: bool | str


class TemplateLimitError(GenerationError):
    """A chat template reached a limit of time, memory or text, and would again."""


def as_messages(conversation: str | Sequence[Message], system: str | None = None) -> list[dict[str, Any]]:
    """Messages of a conversation. A text becomes one user message; `system` becomes a system message before the others.

    Raises GenerationError for anything but a text or a list of messages, and for a list with a system message of its
    own beside `system`, and for a message with an image, a video or a sound: npuq runs a model's text part alone.
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
        _refuse_media(message.get("content"), index)
        messages.append(dict(message))
    if not messages:
        raise GenerationError("the conversation is empty; give at least one message")
    if system is not None:
        if messages[0]["role"] == "system":
            raise GenerationError("the conversation begins with a system message already; give only one of the two")
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _refuse_media(content: Any, index: int) -> None:
    for part in content if isinstance(content, (list, tuple)) else ():
        if not isinstance(part, Mapping):
            continue
        # `{"type": "image_url", "image_url": …}` and the like; templates also go by the key without a type.
        kinds = [kind for kind in (part.get("type"), *part) if isinstance(kind, str)]
        found = next((kind for kind in kinds if any(word in kind for word in _MEDIA)), None)
        if found is not None:
            raise GenerationError(
                f"messages[{index}] has a part {shown(found)}: npuq reads text alone; leave images, videos and sounds "
                "out"
            )


def checked_options(
    options: Mapping[str, Any], variables: Mapping[str, Any] | None
) -> tuple[ChatOptions, dict[str, Any]]:
    """Check options and template variables of a request.

    Variables named `add_generation_prompt` and `continue_final_message` become options. Raises GenerationError for an
    unknown option, a value of a wrong type, and a variable named like any other option.
    """
    unknown = options.keys() - ChatOptions.__annotations__.keys()
    if unknown:
        names = printable(", ".join(sorted(map(str, unknown))))[:80]
        raise GenerationError(f"unknown option {names}; give variables of the template in chat_template_kwargs")
    if not isinstance(variables, (Mapping, type(None))):
        raise GenerationError(f"chat_template_kwargs must be an object, not a {type(variables).__name__}")
    others = dict(variables or {})
    taken = sorted(others.keys() & TEMPLATE_ARGUMENTS)
    if taken:
        raise GenerationError(f"chat_template_kwargs: {', '.join(taken)} cannot be given there")
    chosen = {**options}
    for name in ("add_generation_prompt", "continue_final_message"):
        if name in others:
            chosen[name] = others.pop(name)
    for name, value in chosen.items():
        _check_option(name, value)
    return ChatOptions(**chosen), others  # type: ignore[typeddict-item]


def in_key_order(value: Any) -> Any:
    """Copy a JSON value with the keys of all its objects in order."""
    if isinstance(value, Mapping):
        return {key: in_key_order(value[key]) for key in sorted(value, key=str)}
    return [in_key_order(item) for item in value] if isinstance(value, (list, tuple)) else value


def check_computed(source: str, variables: Mapping[str, Any], where: str) -> None:
    """Raise GenerationError for a template that reads a text which only the model's own code makes of the tools."""
    if _COMPUTED in source and _COMPUTED not in variables:
        raise GenerationError(
            f"{where}: reads {_COMPUTED}, which the model's own code makes of the tools; give it in "
            "chat_template_kwargs"
        )


def _check_option(name: str, value: Any) -> None:
    if name in ("tools", "documents"):
        expected = "a list of JSON objects"
        fits = value is None or (isinstance(value, (list, tuple)) and all(isinstance(each, Mapping) for each in value))
    elif name in ("system", "chat_template"):
        expected, fits = "a text", value is None or isinstance(value, str)
    elif name == "continue_final_message":
        expected, fits = "True, False or the name of a field", isinstance(value, (bool, str))
    else:
        expected, fits = "True or False", isinstance(value, bool)
    if not fits:
        raise GenerationError(f"{name} must be {expected}, not {shown(value)}")


def render(
    messages: Sequence[dict[str, Any]],
    continue_final_message: bool | str,
    source: str,
    template: Callable[[list[dict[str, Any]]], str],
) -> str:
    """Render messages with `template`, of that source.

    A message's reasoning is given under each name that templates read. Arguments of tool calls are given as objects:
    clients send text, and most templates write JSON of what they get. Fields of None are left out, as most templates
    expect. Where that fails they are given as None, since some templates (DeepSeek's) test whether content is none.
    Where that fails too, the arguments are given as text, which some templates (DeepSeek's, too) join with other text.
    """
    present = [
        _with_reasoning({name: value for name, value in message.items() if value is not None}) for message in messages
    ]
    given = [{**message, **some} for message, some in zip(messages, present, strict=True)]
    forms = [_with_objects(present), _with_objects(given), present, given]
    failures: dict[int, GenerationError] = {}
    for place, form in enumerate(forms):
        if form in forms[:place]:
            continue
        try:
            return _continued(form, continue_final_message, source, template)
        except TemplateLimitError:
            raise
        except GenerationError as error:
            failures[place] = error
    raise failures[forms.index(present)] from None


def _with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the arguments of tool calls as objects, where their text is JSON of one."""
    return [
        {**message, "tool_calls": [_with_object(call) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), (list, tuple))
        else message
        for message in messages
    ]


def _with_object(call: Any) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _continued(
    messages: list[dict[str, Any]], field: bool | str, source: str, template: Callable[[list[dict[str, Any]]], str]
) -> str:
    """Cut the rendered text after the last message's field, if that is to be continued."""
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
    # Without the space behind the mark, the template strips its texts: strip this one.
    return rendered[:place] if rendered.startswith(_MARK, place) else rendered[:place].rstrip()


def _mark(content: Any, name: str) -> tuple[str, Any]:
    """Text to continue, and the content with a mark at that text's end. It is the content, or its last text part."""
    if isinstance(content, str):
        return content, content + _MARK
    if isinstance(content, (list, tuple)):
        for index in reversed(range(len(content))):
            part = content[index]
            if isinstance(part, Mapping) and isinstance(part.get("text"), str):
                marked = {**part, "text": part["text"] + _MARK}
                return part["text"], [*content[:index], marked, *content[index + 1 :]]
    raise GenerationError(f"continue_final_message: the last message's {name} holds no text to continue")
