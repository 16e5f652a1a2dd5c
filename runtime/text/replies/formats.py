"""The formats of replies, as a table, and the choice of a model's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ....choices import REASONING_FORMATS, TOOL_FORMATS
from ....errors import GenerationError
from ..tokenizer import Tokenizer
from .call_grammar import Symbol, fenced_calls, key_value_calls, kimi_calls, object_calls, plain_calls
from .calls import CallReader, KeyValueCall, MarkedCall, NamedObjectCall, fenced_head, kimi_head, plain_head
from .tools import Tool


@dataclass(frozen=True)
class ReasoningFormat:
    """Markers around reasoning."""

    name: str
    begin: str
    end: str


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes tool calls.

    section: markers around all calls of a reply, if there are any. call: markers around one. inner: markers within one.
    reader: makes the reader of one call, for the tools offered. grammar: writes the rules of calls (call_grammar.py).
    is_used_in: whether a chat template writes calls so.
    """

    name: str
    section: tuple[str, str] | None
    call: tuple[str, str]
    inner: tuple[str, ...]
    reader: Callable[[Sequence[Tool]], CallReader]
    grammar: Callable[[Symbol, Sequence[str], Sequence[Tool], int, bool], str]
    is_used_in: Callable[[str], bool]

    @property
    def markers(self) -> tuple[str, ...]:
        return (*(self.section or ()), *self.call, *self.inner)


_DEEPSEEK_SECTION: Final = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL: Final = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_DEEPSEEK_SEPARATOR: Final = "<｜tool▁sep｜>"
_KIMI_SECTION: Final = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_TAGS: Final = ("<tool_call>", "</tool_call>")
_GLM_KEY: Final = ("<arg_key>", "</arg_key>")
_GLM_VALUE: Final = ("<arg_value>", "</arg_value>")

_REASONING: Final = (
    ReasoningFormat("deepseek", "<think>", "</think>"),
    ReasoningFormat("kimi", "◁think▷", "◁/think▷"),
)
_TOOLS: Final = (
    ToolFormat(
        name="deepseek-v3",
        section=_DEEPSEEK_SECTION,
        call=_DEEPSEEK_CALL,
        inner=(_DEEPSEEK_SEPARATOR,),
        reader=lambda tools: MarkedCall(fenced_head),
        grammar=fenced_calls,
        is_used_in=lambda source: _DEEPSEEK_CALL[0] in source and "```json" in source,
    ),
    ToolFormat(
        name="deepseek-v31",
        section=_DEEPSEEK_SECTION,
        call=_DEEPSEEK_CALL,
        inner=(_DEEPSEEK_SEPARATOR,),
        reader=lambda tools: MarkedCall(plain_head),
        grammar=plain_calls,
        is_used_in=lambda source: _DEEPSEEK_CALL[0] in source and "```json" not in source,
    ),
    ToolFormat(
        name="kimi-k2",
        section=_KIMI_SECTION,
        call=("<|tool_call_begin|>", "<|tool_call_end|>"),
        inner=("<|tool_call_argument_begin|>",),
        reader=lambda tools: MarkedCall(lambda before, between: kimi_head(before, between, tools)),
        grammar=kimi_calls,
        is_used_in=lambda source: _KIMI_SECTION[0] in source,
    ),
    ToolFormat(
        name="glm-4.5",
        section=None,
        call=_TAGS,
        inner=(*_GLM_KEY, *_GLM_VALUE),
        reader=lambda tools: KeyValueCall({tool.name: tool for tool in tools}, _GLM_KEY, _GLM_VALUE),
        grammar=key_value_calls,
        is_used_in=lambda source: _TAGS[0] in source and _GLM_KEY[0] in source,
    ),
    ToolFormat(
        name="qwen3",
        section=None,
        call=_TAGS,
        inner=(),
        reader=lambda tools: NamedObjectCall(),
        grammar=object_calls,
        # Qwen3-Coder writes <function=…> between the same tags.
        is_used_in=lambda source: _TAGS[0] in source and not any(tag in source for tag in (_GLM_KEY[0], "<function=")),
    ),
)
_BY_NAME: Final[Mapping[str, ReasoningFormat]] = {each.name: each for each in _REASONING}
_TOOLS_BY_NAME: Final[Mapping[str, ToolFormat]] = {each.name: each for each in _TOOLS}


@dataclass(frozen=True)
class ReplyFormat:
    """How a model writes its replies. Without reasoning and calls, a reply is all content.

    tools: those that the request offers. Calls of a reply to a request without tools are content. parallel: a reply may
    have several calls; else it ends with its first.
    """

    reasoning: ReasoningFormat | None = None
    calls: ToolFormat | None = None
    tools: Sequence[Tool] = ()
    parallel: bool = True

    @property
    def markers(self) -> tuple[str, ...]:
        reasoning = () if self.reasoning is None else (self.reasoning.begin, self.reasoning.end)
        return (*reasoning, *(() if self.calls is None else self.calls.markers))

    def begins_inside_reasoning(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
        """True if the prompt ends with the marker that begins reasoning, white space aside."""
        return self.reasoning is not None and _ends_with(self.reasoning.begin, tokenizer, prompt)

    def begins_behind_reasoning(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
        """True if the prompt ends with the marker that ends reasoning, white space aside: the reply has none."""
        return self.reasoning is not None and _ends_with(self.reasoning.end, tokenizer, prompt)


def _ends_with(marker: str, tokenizer: Tokenizer, prompt: Sequence[int]) -> bool:
    wanted, end = marker.encode(), b""
    for token in reversed(prompt):
        end = (tokenizer.token_bytes(token) + end).rstrip()  # at once: a prompt may end in a million spaces
        if len(end) >= len(wanted):
            break
    return end.endswith(wanted)


PLAIN: Final = ReplyFormat()
"""The format of a reply that is all content."""


def find_format(tokenizer: Tokenizer, reasoning: str = "auto", tools: str = "auto") -> ReplyFormat:
    """The format of a model's replies. "auto" goes by its chat templates and tokens; "none" leaves markers in the text.

    Raises GenerationError for an unknown name.
    """
    for name, known in ((reasoning, REASONING_FORMATS), (tools, TOOL_FORMATS)):
        if name not in known:
            raise GenerationError(f"reply format {name!r} is unknown; npuq has {', '.join(known)}")
    sources = [template.source for template in tokenizer.templates.values()]

    def thinks(each: ReasoningFormat) -> bool:
        markers = (each.begin, each.end)
        return any(marker in source for source in sources for marker in markers) or all(
            tokenizer.token_id(marker) is not None for marker in markers
        )

    def calls(each: ToolFormat) -> bool:
        # Kimi-K2's first template writes no calls, and no other model has its tokens.
        own = each.section is not None and each.section[0] == _KIMI_SECTION[0]
        return any(map(each.is_used_in, sources)) or (own and tokenizer.token_id(_KIMI_SECTION[0]) is not None)

    return ReplyFormat(
        next(filter(thinks, _REASONING), None) if reasoning == "auto" else _BY_NAME.get(reasoning),
        next(filter(calls, _TOOLS), None) if tools == "auto" else _TOOLS_BY_NAME.get(tools),
    )
