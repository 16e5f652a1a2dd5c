"""The grammar of a whole reply: of its content or its tool calls, behind its reasoning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ....errors import GenerationError
from ...text.replies.formats import ReasoningFormat, ReplyFormat
from ...text.replies.tools import Tool
from ...text.tokenizer import Tokenizer
from ..grammar import Grammar
from .checking import first_fault
from .compiler import GrammarCompiler, MakeGrammar, in_a_line
from .gates import AfterReasoning, OnceCalled

_MOST_SCHEMA_CHARACTERS: Final = 1 << 16


@dataclass(frozen=True)
class Constraint:
    """The form that a reply must have.

    schema: JSON schema of its content; None: any text. calls: "none", "allowed" or "required" of the format's tools.
    parallel: several calls may come. first_call: number of the reply's first call, counted over the conversation.
    """

    schema: Mapping[str, Any] | None = None
    calls: str = "none"
    parallel: bool = True
    first_call: int = 0

    def needs_grammar(self, format: ReplyFormat) -> bool:
        """True unless the reply is free."""
        strict = self.calls == "allowed" and any(tool.strict for tool in format.tools)
        return self.schema is not None or self.calls == "required" or strict


def constrain(
    compiler: GrammarCompiler, tokenizer: Tokenizer, format: ReplyFormat, prompt: Sequence[int], wanted: Constraint
) -> MakeGrammar:
    """Compile the grammar of a reply to `prompt`, one that `needs_grammar`.

    Raises GenerationError for a schema that is too long or that llguidance does not take, and for calls that the model
    has no format for.
    """
    alternatives, rules = [], []
    schemas: dict[str, str] = {}  # by what they are
    if wanted.schema is not None:
        alternatives.append("content")
        schemas["the JSON schema"] = json.dumps(_readable(wanted.schema, "the JSON schema"))
        rules.append(f"content: %json {schemas['the JSON schema']}")
    if wanted.calls != "none":
        alternatives.append("calls")
        tools = _tools(format, wanted)
        schemas |= {f"the schema of tool {tool.name}": json.dumps(tool.parameters) for tool in tools}
        rules.append(_calls(tokenizer, format, wanted, tools))
    inside = format.begins_inside_reasoning(tokenizer, prompt)
    markers = _marker_ids(tokenizer, format.reasoning)
    prefix = ""
    if inside and markers is None:
        assert format.reasoning is not None
        prefix = "thinking "
        rules.append(f"thinking[suffix={json.dumps(format.reasoning.end)}]: /(?s:.*)/")
    grammar = "\n".join([f"start: {prefix}({' | '.join(alternatives)})", *rules])
    _check(schemas, grammar)
    make = compiler.compile(grammar)
    if wanted.schema is None and wanted.calls == "allowed":
        return _once_called(make, tokenizer, format)
    if markers is None:
        return make
    begin, end = markers
    may_begin = not inside and not format.begins_behind_reasoning(tokenizer, prompt)
    where: Any = {"inside": inside, "may_begin": may_begin, "ends": compiler.ends, "size": compiler.size}
    return lambda: AfterReasoning(make(), begin, end, **where)


def _once_called(make: MakeGrammar, tokenizer: Tokenizer, format: ReplyFormat) -> MakeGrammar:
    assert format.calls is not None
    marker = tokenizer.token_id(format.calls.markers[0])
    if marker is None:
        raise GenerationError('strict tools need tool_choice "required": the markers of calls are no tokens here')
    found = marker

    def once() -> Grammar:
        return OnceCalled(make(), found)

    return once


def _tools(format: ReplyFormat, wanted: Constraint) -> list[Tool]:
    """The tools that may be called, with parameters as llguidance is to read them."""
    # Without `strict`, an argument object of a tool that was called freely may be any.
    free = wanted.calls == "allowed"
    tools = [tool if tool.strict or not free else tool.with_any_arguments() for tool in format.tools]
    return [
        replace(tool, parameters=_readable(tool.object_schema, f"the schema of tool {tool.name}")) for tool in tools
    ]


def _calls(tokenizer: Tokenizer, format: ReplyFormat, wanted: Constraint, tools: Sequence[Tool]) -> str:
    if format.calls is None:
        raise GenerationError("this model has no known format of tool calls; name one with --tools")

    def symbol(marker: str) -> str:
        id = tokenizer.token_id(marker)
        return json.dumps(marker, ensure_ascii=False) if id is None else f"<[{id}]>"

    return format.calls.grammar(symbol, format.calls.markers, tools, wanted.first_call, wanted.parallel)


def _marker_ids(tokenizer: Tokenizer, reasoning: ReasoningFormat | None) -> tuple[int, int] | None:
    """Token ids of the markers of reasoning; None where there is none, or where they are no tokens."""
    if reasoning is None:
        return None
    begin, end = tokenizer.token_id(reasoning.begin), tokenizer.token_id(reasoning.end)
    return None if begin is None or end is None else (begin, end)


def _check(schemas: Mapping[str, str], grammar: str) -> None:
    """Raise GenerationError for a grammar that llguidance does not take. schemas: those in it, by what they are.

    The grammar is compiled as a whole, too: it has parts of schemas that compile where their schema leaves them out.
    """
    found = first_fault([*(f"start: %json {schema}" for schema in schemas.values()), grammar])
    if found is not None:
        place, fault = found
        what = [*schemas, "the grammar of the reply"][place]
        raise GenerationError(f"{what} cannot be used: {in_a_line(fault)}")


def _readable(schema: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The schema as llguidance is to read it. Raises GenerationError for one that is too long."""
    # Its own option, and no other: `oneOf` is read as `anyOf`.
    whole = {**schema, "x-guidance": {"coerce_one_of": True}}
    try:
        text = json.dumps(whole)
    except RecursionError:
        raise GenerationError(f"{what} is nested too deeply") from None
    if len(text) > _MOST_SCHEMA_CHARACTERS:
        raise GenerationError(f"{what} is longer than {_MOST_SCHEMA_CHARACTERS} characters")
    return whole
