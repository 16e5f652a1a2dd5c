"""Commands of a conversation: lines that begin with a slash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import GenerationError
from ...inputs.json_text import parse_json
from ...inputs.printable import shown

if TYPE_CHECKING:
    from .session import Session


def run(session: Session, line: str) -> bool:
    """Obey a command; False for the one that leaves. Raises GenerationError for an unknown or wrong one."""
    name, _, rest = line[1:].partition(" ")
    found = COMMANDS.get(name)
    if found is None:
        raise GenerationError(f"/{shown(name)[1:-1]} is no command; /help lists them, // begins a message with a slash")
    found[1](session, rest.strip())
    return name != "exit"


def _help(session: Session, _: str) -> None:
    lines = [(f"/{name} {arguments}".strip(), text) for name, (arguments, _function, text) in COMMANDS.items()]
    width = max(len(usage) for usage, _text in lines)
    for usage, text in lines:
        session.screen.note(f"{usage:{width}}  {text}")
    session.screen.note('A line of """ begins a message of several lines, and another ends it. // stands for /.')
    session.screen.note("Ctrl-C stops an answer, and keeps what came; twice, or Ctrl-D, leaves.")


def _clear(session: Session, _: str) -> None:
    session.clear()
    session.screen.note("a new conversation" + ("" if session.transcript.system is None else ", same system message"))


def _system(session: Session, text: str) -> None:
    if not text:
        system = session.transcript.system
        session.screen.note("no system message" if system is None else f"system: {system}")
        return
    session.transcript.system = None if text == '""' else text
    session.screen.note("the system message is changed; the conversation goes on")


def _set(session: Session, text: str) -> None:
    if text:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise GenerationError("/set takes NAME=VALUE, as in /set temperature=0.6; NAME= takes it back")
        session.set(name.replace("-", "_"), _value(value))
    settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in session.settings.items())
    session.screen.note(settings or "no settings: the model's own")


def _value(text: str) -> Any:
    """A setting as JSON; what is none is a text. None takes a setting back."""
    if not text:
        return None
    try:
        return parse_json(text, "", GenerationError)
    except GenerationError:
        return text


def _save(session: Session, text: str) -> None:
    session.transcript.save(_path(text, "/save"))
    session.screen.note(f"saved {len(session.transcript.messages())} messages")


def _load(session: Session, text: str) -> None:
    session.load(_path(text, "/load"))


def _path(text: str, command: str) -> Path:
    if not text:
        raise GenerationError(f"{command} takes the name of a file")
    return Path(text)


def _retry(session: Session, _: str) -> None:
    question = session.transcript.undo()
    if question is None:
        raise GenerationError("there is no question to ask again")
    session.ask(question)


def _undo(session: Session, _: str) -> None:
    question = session.transcript.undo()
    if question is None:
        raise GenerationError("there is no question to take back")
    session.screen.note(f"taken back: {question if len(question) <= 60 else question[:59] + '…'}")


def _stats(session: Session, _: str) -> None:
    for line in session.stats():
        session.screen.note(line)


def _exit(session: Session, _: str) -> None:
    """Leaving is `run`'s."""


# Name → (arguments, function, help).
COMMANDS: Final[dict[str, tuple[str, Callable[[Session, str], None], str]]] = {
    "help": ("", _help, "this list"),
    "system": ("TEXT", _system, 'show or change the system message; "" removes it'),
    "set": ("NAME=VALUE", _set, 'show or change sampling: temperature=0.6, max_new_tokens=200, stop=["\\n"], …'),
    "retry": ("", _retry, "ask the last question again"),
    "undo": ("", _undo, "take back the last question and its answer"),
    "clear": ("", _clear, "start over, with the same system message and settings"),
    "save": ("FILE", _save, "write the conversation as JSON, as --messages and --load read it"),
    "load": ("FILE", _load, "replace the conversation by one of a file"),
    "stats": ("", _stats, "tokens, speed and use of the prefix cache"),
    "exit": ("", _exit, "leave"),
}
