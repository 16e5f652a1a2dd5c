"""What a conversation needs of the model that answers: in this process or behind a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = Mapping[str, Any]


class StopReply(BaseException):
    """Leaves the reading of a reply that the user has stopped, wherever it waits."""


@dataclass(frozen=True)
class Delta:
    """The next text of an answer: of its reasoning, or of its content."""

    content: str = ""
    reasoning: str = ""


@dataclass(frozen=True)
class Ending:
    """Facts of an answer that has ended. Counts are None where the model does not tell them.

    cached_tokens: those of the prompt whose keys and values the prefix cache held.
    """

    finish_reason: str | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None


class Reply(Iterator[Delta], Protocol):
    """One answer as it comes."""

    @property
    def ending(self) -> Ending:
        """Facts of the end, after the last delta."""

    def stop(self) -> None:
        """End the answer soon, from a signal handler: return, or raise StopReply."""

    def close(self) -> None:
        """Free what the answer holds."""


class ChatModel(Protocol):
    """A model that answers conversations.

    name: for people. context: most tokens of a conversation, None where unknown. notes: lines to show at the start.
    """

    name: str
    context: int | None
    notes: list[str]

    def check(self, settings: Mapping[str, Any]) -> None:
        """Raise GenerationError for settings (fields of SamplingParams by name) that it cannot take."""

    def reply(self, messages: Sequence[Message], settings: Mapping[str, Any]) -> Reply:
        """Begin an answer. Errors may come with its first delta: NpuqError."""

    def close(self) -> None:
        """End the use of the model."""
