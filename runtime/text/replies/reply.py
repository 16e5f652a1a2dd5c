"""The state machine of a reply: tokens go in, parts come out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ..detokenizing import StopSearch
from ..tokenizer import Tokenizer
from .calls import CallReader, Head
from .formats import PLAIN, ReplyFormat
from .markers import Chunk, Marker, MarkerScanner
from .parts import CallDelta, Part, ToolCall

_CONTENT: Final = "content"
_REASONING: Final = "reasoning"
_SECTION: Final = "section"
"""Between the calls of a section."""
_CALL: Final = "call"
_MOST_OPENING: Final = 16
"""Characters of white space that open a reply and are held back."""


@dataclass
class _Call:
    """A call that is being read. texts: of all of it without markers, while it may turn out to be none."""

    reader: CallReader
    texts: list[str] = field(default_factory=list)
    given: bool = False


class Reply:
    """One reply of a model, read token by token.

    Markers are in no part. White space beside a marker of reasoning, and after a marker of calls, belongs to nothing.
    White space that opens a reply is held back for a while: some models write it before they begin to reason.
    A reply begins inside reasoning if its prompt ends with the marker for it. What should be a call and is none comes
    back as content. Stop strings are searched in the content, in which the first `min_tokens` tokens neither hold nor
    begin one. A token that ends the sequence is not added.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        format: ReplyFormat = PLAIN,
    ):
        self._scanner = MarkerScanner(tokenizer, prompt, format.markers)
        self._search = StopSearch(stop)
        self._format = format
        self._early = min_tokens
        self._state = _REASONING if format.begins_inside_reasoning(tokenizer, prompt) else _CONTENT
        self._trims = self._state == _REASONING  # white space is dropped until other text comes
        self._opens = format.reasoning is not None and self._state == _CONTENT  # nothing has come yet
        self._space: list[Chunk] = []  # held back: it may belong to a marker
        self._reasoning: list[str] = []
        self._call: _Call | None = None
        self._calls: list[tuple[Head, list[str]]] = []  # and pieces of its arguments
        self._called = False
        self.reasoning_tokens = 0
        self.malformed_calls = 0

    @property
    def text(self) -> str:
        """The content given so far."""
        return self._search.text

    @property
    def reasoning(self) -> str:
        """The reasoning given so far."""
        return "".join(self._reasoning)

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The tool calls given so far."""
        return tuple(ToolCall(head.id, head.name, "".join(pieces)) for head, pieces in self._calls)

    @property
    def stopped(self) -> bool:
        """True after a stop string, and after the only call where several are not allowed."""
        return self._search.stopped or self._called

    def add(self, token: int) -> list[Part]:
        """Add a token: the parts that it makes final, in their order."""
        self._early -= 1
        was_reasoning = self._state == _REASONING
        parts = self._read(self._scanner.add(token))
        self.reasoning_tokens += was_reasoning or self._state == _REASONING
        return _merged(parts)

    def flush(self) -> list[Part]:
        """End the reply: what was held back."""
        parts = self._read(self._scanner.flush())
        if self._call is not None:
            parts += self._end_call()
        if self._state == _CONTENT:
            parts += self._given_space()
        text = self._search.flush()
        return _merged([*parts, Part(text, tokens=self._search.take_settled())])

    def _read(self, items: Sequence[Chunk | Marker]) -> list[Part]:
        parts: list[Part] = []
        for item in items:
            if self.stopped:
                break
            parts += self._on_marker(item.text) if isinstance(item, Marker) else self._on_text(item)
        return parts

    def _on_text(self, chunk: Chunk) -> list[Part]:
        if self._state == _CALL:
            return self._on_call(chunk)
        if self._trims or self._state == _SECTION:
            text = chunk.text.lstrip()
            if chunk.text and not text:
                return []
            self._trims = self._trims and not text
            chunk = replace(chunk, text=text)
        if self._state == _REASONING:
            return self._on_reasoning(chunk)
        if self._opens:
            if not chunk.text.strip() and sum(len(each.text) for each in self._space) < _MOST_OPENING:
                self._space.append(chunk)
                return []
            self._opens = False
        return [*self._given_space(), *self._on_content(chunk)]

    def _given_space(self) -> list[Part]:
        """Content of the white space held back."""
        held, self._space = self._space, []
        return [part for chunk in held for part in self._on_content(chunk)]

    def _on_content(self, chunk: Chunk) -> list[Part]:
        text = self._search.add(chunk.text, chunk.tokens, early=self._early >= 0)
        return [Part(text, tokens=self._search.take_settled())] if text else []

    def _on_reasoning(self, chunk: Chunk) -> list[Part]:
        kept = chunk.text.rstrip()
        if not kept:
            self._space.append(chunk)
            return []
        given = [*self._space, replace(chunk, text=kept)]
        self._space = [Chunk(chunk.text[len(kept) :])]
        text = "".join(each.text for each in given)
        self._reasoning.append(text)
        return [Part(reasoning=text, tokens=tuple(token for each in given for token in each.tokens))]

    def _on_call(self, chunk: Chunk) -> list[Part]:
        call = self._call
        assert call is not None
        if not call.given:
            call.texts.append(chunk.text)
        arguments = call.reader.add(chunk.text)
        return self._on_arguments(call, arguments, chunk.tokens)

    def _on_arguments(self, call: _Call, arguments: str, tokens: tuple[int, ...]) -> list[Part]:
        head = call.reader.head
        if head is None or not self._format.tools:
            return []
        parts = []
        if not call.given:
            call.given = True
            parts.append(Part(call=CallDelta(len(self._calls), head.id, head.name)))
            self._calls.append((head, []))
        if arguments:
            self._calls[-1][1].append(arguments)
            parts.append(Part(call=CallDelta(len(self._calls) - 1, arguments=arguments), tokens=tokens))
        return parts

    def _end_call(self) -> list[Part]:
        call, self._call = self._call, None
        assert call is not None
        parts = self._on_arguments(call, call.reader.end(), ())
        text = "" if call.given else "".join(call.texts)
        if text.strip():
            self.malformed_calls += 1
            parts += self._on_content(Chunk(text))
        self._called = call.given and not self._format.parallel
        return parts

    def _on_marker(self, marker: str) -> list[Part]:
        reasoning, calls = self._format.reasoning, self._format.calls
        parts: list[Part] = []
        if reasoning is not None and marker in (reasoning.begin, reasoning.end):
            if self._state == _CALL:
                return []
            self._space, self._opens = [], False
            self._trims = self._trims or self._state == _REASONING or marker == reasoning.begin
            self._state = _REASONING if marker == reasoning.begin else _CONTENT
            return []
        assert calls is not None
        if marker in calls.inner:
            if self._call is not None:
                parts += self._on_arguments(self._call, self._call.reader.mark(marker), ())
            return parts
        if self._call is not None:
            parts += self._end_call()
        self._space, self._opens, self._trims = [], False, True
        if marker == calls.call[0]:
            self._state = _CALL
            self._call = _Call(calls.reader(self._format.tools))
        else:
            ends = marker == calls.section[1] if calls.section else marker == calls.call[1]
            self._state = _CONTENT if ends else _SECTION
        return parts


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Join neighbouring parts of a kind, and leave empty ones out. A call's first part, with its name, stays alone."""
    merged: list[Part] = []
    for part in parts:
        if part == Part():
            continue
        last = merged[-1] if merged else None
        joined = None if last is None else _joined(last, part)
        if joined is None:
            merged.append(part)
        else:
            merged[-1] = joined
    return merged


def _joined(first: Part, second: Part) -> Part | None:
    """Two parts as one; None if they are of different kinds."""
    tokens, call, more = first.tokens + second.tokens, first.call, second.call
    if call is None and more is None and bool(first.reasoning) == bool(second.reasoning):
        return Part(first.text + second.text, first.reasoning + second.reasoning, tokens=tokens)
    if call is not None and more is not None and call.name is None and more.name is None and call.index == more.index:
        return Part(call=replace(call, arguments=call.arguments + more.arguments), tokens=tokens)
    return None
