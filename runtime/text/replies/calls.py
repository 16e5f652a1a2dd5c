"""Readers of tool calls, one for each way that models write them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from .tools import Tool

_NAME: Final = r"[A-Za-z0-9_.-]{1,256}"
_DEEPSEEK_NAME: Final = re.compile(rf"\s*({_NAME})\s*")
_FENCED_NAME: Final = re.compile(rf"\s*({_NAME})\s*```(?:json)?\s*")
_KIMI_ID: Final = re.compile(rf"(?:functions\.)?({_NAME}):\d+")
_BARE_ID: Final = re.compile(r"\d{1,9}|call_[A-Za-z0-9_-]{1,256}")
_NAMED_OBJECT: Final = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


@dataclass(frozen=True)
class Head:
    """Id and name of a call."""

    id: str
    name: str


class CallReader(Protocol):
    """Reads one call, from after its opening marker to before its closing one.

    head: set once it is known. Without a head, text that is no call has been read.
    """

    head: Head | None

    def add(self, text: str) -> str:
        """Add text: the part of the arguments that it completes."""

    def mark(self, marker: str) -> str:
        """Add a marker within the call: as `add`."""

    def end(self) -> str:
        """End the call: what is missing of the arguments."""


class MarkedCall:
    """A call whose name and arguments a marker separates: the formats of DeepSeek and Kimi.

    parse_head: makes the head of the text before the marker and of that between the marker and the arguments; None if
    they are no head.
    """

    def __init__(self, parse_head: Callable[[str, str], Head | None]):
        self._parse_head = parse_head
        self._before, self._between = "", ""
        self._marked = self._broken = False
        self._object = ObjectScanner()
        self.head: Head | None = None

    def add(self, text: str) -> str:
        if self.head is not None:
            return self._object.add(text)
        if not self._marked:
            self._before += text
            return ""
        place = text.find("{")
        self._between += text if place < 0 else text[:place]
        if place < 0 or self._broken:
            return ""
        self.head = self._parse_head(self._before, self._between)
        self._broken = self.head is None
        return "" if self._broken else self._object.add(text[place:])

    def mark(self, marker: str) -> str:
        self._marked = True
        return ""

    def end(self) -> str:
        return ""


class NamedObjectCall:
    """A call that is an object with name and arguments: the format of Qwen3."""

    def __init__(self) -> None:
        self._text = ""
        self._object = ObjectScanner()
        self.head: Head | None = None

    def add(self, text: str) -> str:
        if self.head is not None:
            return self._object.add(text)
        self._text += text
        found = _NAMED_OBJECT.match(self._text)
        if found is None or re.fullmatch(_NAME, found[1]) is None:
            return ""
        self.head = Head(new_id(), found[1])
        return self._object.add(self._text[found.end() :])

    def mark(self, marker: str) -> str:
        return ""

    def end(self) -> str:
        if self.head is not None:
            return ""
        try:  # with its keys in another order
            call = json.loads(self._text)
            name, arguments = call["name"], call.get("arguments", {})
            text = _as_json(arguments)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return ""
        if not isinstance(name, str) or re.fullmatch(_NAME, name) is None or not isinstance(arguments, dict):
            return ""
        self.head = Head(new_id(), name)
        return text


class KeyValueCall:
    """A call whose arguments stand between markers, one by one: the format of GLM-4.5.

    tools: by name, for the types of arguments. A value is text where its schema has only texts, else JSON if it can be.
    """

    def __init__(self, tools: Mapping[str, Tool], key: tuple[str, str], value: tuple[str, str]):
        self._tools, self._key, self._value = tools, key, value
        self._name, self._text, self._last_key = "", "", ""
        self._inside: str | None = None
        self._opened = False
        self.head: Head | None = None

    def add(self, text: str) -> str:
        if self._inside is not None:
            self._text += text
        elif self.head is None:
            self._name += text
        return ""

    def mark(self, marker: str) -> str:
        self._find_head()
        inside = self._inside
        if marker in (self._key[0], self._value[0]):
            self._inside, self._text = marker, ""
            return ""
        self._inside = None
        if (inside, marker) == self._key:
            self._last_key = self._text.strip()
        if (inside, marker) != self._value:
            return ""
        before, self._opened = ", " if self._opened else "{", True
        return f"{before}{_as_json(self._last_key)}: {self._json_of(self._text)}"

    def end(self) -> str:
        self._find_head()
        return "" if self.head is None else "}" if self._opened else "{}"

    def _find_head(self) -> None:
        if self.head is None and re.fullmatch(_NAME, self._name.strip()):
            self.head = Head(new_id(), self._name.strip())

    def _json_of(self, text: str) -> str:
        tool = self._tools.get(self.head.name) if self.head is not None else None
        properties = tool.parameters.get("properties") if tool is not None else None
        schema = properties.get(self._last_key) if isinstance(properties, Mapping) else None
        if not (isinstance(schema, Mapping) and schema.get("type") == "string"):
            try:
                return _as_json(json.loads(text))
            except (ValueError, RecursionError):
                pass
        return _as_json(text)


class ObjectScanner:
    """The text of one JSON object, up to the brace that closes it. What follows is dropped."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._escaped = self._closed = False

    def add(self, text: str) -> str:
        """The part of `text` that belongs to the object."""
        if self._closed:
            return ""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_text:
                self._escaped = character == "\\"
                self._in_text = character != '"'
            elif character == '"':
                self._in_text = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._closed = True
                    return text[: place + 1]
        return text


def _as_json(value: Any) -> str:
    r"""JSON of what the model wrote. Raises ValueError for numbers that JSON does not have (NaN, 1e999).

    Characters stay as they are, unless one is half of a pair (`"\ud800"` is JSON, but no UTF-8 can be made of it).
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return text if re.search("[\ud800-\udfff]", text) is None else json.dumps(value, allow_nan=False)


def new_id() -> str:
    """A fresh id of a call, for formats that write none."""
    return f"call_{secrets.token_hex(12)}"


def fenced_head(before: str, between: str) -> Head | None:
    """DeepSeek V3 and R1: `function`, marker, name, and a fence of three backticks before the arguments."""
    found = _FENCED_NAME.fullmatch(between)
    return None if found is None or before.strip() != "function" else Head(new_id(), found[1])


def plain_head(before: str, between: str) -> Head | None:
    """DeepSeek V3.1: name, marker."""
    found = _DEEPSEEK_NAME.fullmatch(before)
    return None if found is None or between.strip() else Head(new_id(), found[1])


def kimi_head(before: str, between: str, tools: Sequence[Tool]) -> Head | None:
    """Kimi-K2: `functions.NAME:NUMBER`, marker. The id stays as the model wrote it, since the template prints it back.

    Of an id without a name, the call is to the only tool.
    """
    id = before.strip()
    found = _KIMI_ID.fullmatch(id)
    if between.strip():
        return None
    if found is not None:
        return Head(id, found[1])
    return Head(id, tools[0].name) if len(tools) == 1 and _BARE_ID.fullmatch(id) else None
