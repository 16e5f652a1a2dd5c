"""The parts of a reply, as they are given out."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallDelta:
    """A part of a tool call: its id and name come first and once, then pieces of its arguments (text of JSON).

    index: number of the call in its reply.
    """

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A whole tool call. arguments: text that the model wrote as JSON, not checked."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Part:
    """The next text of a reply: content, or reasoning, or a part of a tool call, never two of them.

    tokens: numbers of the generated tokens whose text this part brings or begins.
    """

    text: str = ""
    reasoning: str = ""
    call: CallDelta | None = None
    tokens: tuple[int, ...] = ()
