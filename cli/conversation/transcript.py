"""The messages of a conversation: asking, answering, undoing, saving and loading."""

from __future__ import annotations

import json
import os
import secrets
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ...errors import GenerationError
from ...inputs.files import read_given_text, reason
from ...inputs.json_text import parse_json

_MOST_BYTES: Final = 64 << 20
_ROLES: Final = ("system", "user", "assistant")
_FIELDS: Final = ("content", "reasoning_content")


@dataclass
class Transcript:
    """A conversation. turns: messages after the system's, a user's and an assistant's by turns.

    unanswered: the last question, where its answer failed or was undone before any text came.
    """

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)
    unanswered: str | None = None
    _own_files: set[Path] = field(default_factory=set)

    def messages(self, question: str | None = None) -> list[dict[str, str]]:
        """All messages, with a new question behind them."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        after = [] if question is None else [{"role": "user", "content": question}]
        return [*before, *self.turns, *after]

    def answered(self, question: str, content: str, reasoning: str) -> None:
        """Add a question and its answer."""
        answer = {"role": "assistant", "content": content}
        if reasoning:
            answer["reasoning_content"] = reasoning
        self.turns += [{"role": "user", "content": question}, answer]
        self.unanswered = None

    def undo(self) -> str | None:
        """Take back the last question with its answer; return the question, None without one."""
        if self.unanswered is not None:
            question, self.unanswered = self.unanswered, None
            return question
        place = max((place for place, turn in enumerate(self.turns) if turn["role"] == "user"), default=None)
        if place is None:
            return None
        question = self.turns[place]["content"]
        del self.turns[place:]
        return question

    def clear(self) -> None:
        """Start over, with the same system message."""
        self.turns, self.unanswered = [], None

    def save(self, path: Path) -> None:
        """Write the messages as JSON, whole or not at all. A file that this conversation did not write is kept.

        Raises GenerationError.
        """
        path = path.expanduser()
        if os.path.lexists(path) and path.absolute() not in self._own_files:
            raise GenerationError(f"{path}: exists already; save to another name")
        text = json.dumps({"messages": self.messages()}, indent=2, ensure_ascii=False)
        unfinished = path.parent / f".npuq-{secrets.token_hex(8)}.json"
        try:
            with open(unfinished, "x", encoding="utf-8", opener=_private) as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
        except BaseException as cause:  # Ctrl-C too
            with suppress(OSError, ValueError):
                unfinished.unlink()
            if isinstance(cause, (OSError, ValueError)):  # ValueError: a NUL in the name
                raise GenerationError(f"{path}: cannot be written: {reason(cause)}") from cause
            raise
        self._own_files.add(path.absolute())

    def load(self, path: Path) -> None:
        """Replace the conversation by the messages of a file: a list, or an object that has it as `messages`.

        Raises GenerationError for anything else, and for a conversation that does not end with an answer.
        """
        path = path.expanduser()
        value = parse_json(read_given_text(path, GenerationError, _MOST_BYTES), str(path), GenerationError)
        listed = value.get("messages") if isinstance(value, dict) else value
        if not isinstance(listed, list):
            raise GenerationError(f'{path}: holds no messages; give [{{"role": "user", "content": "…"}}]')
        messages = [_message(each, f"{path}: messages[{index}]") for index, each in enumerate(listed)]
        system = messages.pop(0)["content"] if messages and messages[0]["role"] == "system" else None
        if any(message["role"] == "system" for message in messages):
            raise GenerationError(f"{path}: has a system message that is not the first")
        unanswered = messages.pop()["content"] if messages and messages[-1]["role"] == "user" else None
        self.system, self.turns, self.unanswered = system, messages, unanswered
        # As it was read, it may be written again.
        self._own_files.add(path.absolute())


def _private(name: str, flags: int) -> int:
    """Open a file that its owner alone may read."""
    return os.open(name, flags, 0o600)


def _message(value: Any, where: str) -> dict[str, str]:
    """A message of text alone. Raises GenerationError for any other."""
    if not isinstance(value, dict) or value.get("role") not in _ROLES:
        raise GenerationError(f"{where}: is no message of {', '.join(_ROLES)}")
    found = {"role": value["role"], "content": value.get("content")}
    if value.get("reasoning_content") is not None:
        found["reasoning_content"] = value["reasoning_content"]
    for name in _FIELDS:
        if name in found and not isinstance(found[name], str):
            raise GenerationError(f"{where}: {name} must be a text")
    return found
