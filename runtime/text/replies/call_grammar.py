"""Grammars of tool calls as models write them, in Lark with JSON schemas, which llguidance takes.

Each function gives the rules of `calls`: one call, or several where `parallel`. markers: of the format, in the order of
`ToolFormat.markers`. first: number of the reply's first call, counted over the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from ....errors import GenerationError
from .tools import Tool

Symbol = Callable[[str], str]
"""Writes a marker in a grammar: as its token, or as its text."""

_FENCE_BEGIN: Final = "\n```json\n"
_FENCE_END: Final = "\n```"
_MOST_CALLS: Final = 16
"""Calls of one reply whose numbers a grammar counts."""


def fenced_calls(symbol: Symbol, markers: Sequence[str], tools: Sequence[Tool], first: int, parallel: bool) -> str:
    """DeepSeek V3 and R1."""
    begin, end, call_begin, call_end, separator = map(symbol, markers)
    choice = _choice(
        f"{_quoted(f'{tool.name}{_FENCE_BEGIN}')} args_{n} {_quoted(_FENCE_END)}" for n, tool in _numbered(tools)
    )
    call = f'{call_begin} "function" {separator} {choice} {call_end}'
    more = f" ({_quoted(chr(10))} {call})*" if parallel else ""
    return _grammar(f"{begin} {call}{more} {end}", tools)


def plain_calls(symbol: Symbol, markers: Sequence[str], tools: Sequence[Tool], first: int, parallel: bool) -> str:
    """DeepSeek V3.1."""
    begin, end, call_begin, call_end, separator = map(symbol, markers)
    choice = _choice(f"{_quoted(tool.name)} {separator} args_{n}" for n, tool in _numbered(tools))
    return _grammar(f"{begin} ({call_begin} {choice} {call_end}){'+' if parallel else ''} {end}", tools)


def kimi_calls(symbol: Symbol, markers: Sequence[str], tools: Sequence[Tool], first: int, parallel: bool) -> str:
    """Kimi-K2, whose calls are numbered."""
    begin, end, call_begin, call_end, separator = map(symbol, markers)

    def call(index: int) -> str:
        choice = _choice(
            f"{_quoted(f'functions.{tool.name}:{index}')} {separator} args_{n}" for n, tool in _numbered(tools)
        )
        return f"{call_begin} {choice} {call_end}"

    calls = ""
    for index in reversed(range(first, first + (_MOST_CALLS if parallel else 1))):
        calls = f"{call(index)} ({calls})?" if calls else call(index)
    return _grammar(f"{begin} {calls} {end}", tools)


def object_calls(symbol: Symbol, markers: Sequence[str], tools: Sequence[Tool], first: int, parallel: bool) -> str:
    """Qwen3."""
    begin, end = map(symbol, markers)
    heads = ((n, "\n" + f'{{"name": {json.dumps(tool.name)}, "arguments": ') for n, tool in _numbered(tools))
    choice = _choice(f"{_quoted(head)} args_{n} {_quoted('}' + chr(10))}" for n, head in heads)
    call = f"{begin} {choice} {end}"
    return _grammar(call + (f" ({_quoted(chr(10))} {call})*" if parallel else ""), tools)


def key_value_calls(symbol: Symbol, markers: Sequence[str], tools: Sequence[Tool], first: int, parallel: bool) -> str:
    """GLM-4.5: arguments one by one, in the order of the schema; a text is written as it is."""
    begin, end, key_begin, key_end, value_begin, value_end = map(symbol, markers)
    line, rules = _quoted("\n"), []

    def argument(tool: int, number: int, key: str, schema: Any, shared: dict[str, Any]) -> str:
        value = f"value_{tool}_{number}"
        rules.append(f"{value}: {_value(schema, shared)}")
        return f"{key_begin} {_quoted(key)} {key_end} {line} {value_begin} {value} {value_end} {line}"

    bodies = []
    for n, tool in _numbered(tools):
        schema = tool.parameters
        shared = {name: schema[name] for name in ("$defs", "definitions", "x-guidance") if name in schema}
        required = schema.get("required") or ()
        parts = [_quoted(f"{tool.name}\n")]
        properties = schema.get("properties") or {}
        if not isinstance(properties, Mapping) or not isinstance(required, (list, tuple)):
            raise GenerationError(f"tool {tool.name}: properties must be an object, and required a list")
        for number, (key, inner) in enumerate(properties.items()):
            written = argument(n, number, key, inner, shared)
            parts.append(written if key in required else f"({written})?")
        bodies.append(" ".join(parts))
    call = f"{begin} {_choice(bodies)} {end}"
    more = f" ({line} {call})*" if parallel else ""
    return "\n".join([f"calls: {call}{more}", *rules])


def _value(schema: Any, shared: Mapping[str, Any]) -> str:
    """A value between markers: a text as it is, anything else as JSON. shared: definitions that schemas refer to."""
    if not isinstance(schema, Mapping) or schema.get("type") != "string":
        return f"%json {json.dumps({**shared, **schema} if isinstance(schema, Mapping) else schema)}"
    texts = schema.get("enum")
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return _choice(map(_quoted, texts))
    most = schema.get("maxLength")
    return f"/(?s:.{{0,{most}}})/" if type(most) is int and 0 <= most < 10**6 else "/(?s:.*)/"


def _grammar(calls: str, tools: Sequence[Tool]) -> str:
    return "\n".join(
        [f"calls: {calls}", *(f"args_{n}: %json {json.dumps(tool.object_schema)}" for n, tool in _numbered(tools))]
    )


def _numbered(tools: Sequence[Tool]) -> list[tuple[int, Tool]]:
    return list(enumerate(tools))


def _choice(alternatives: Iterable[str]) -> str:
    return f"({' | '.join(alternatives)})"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
