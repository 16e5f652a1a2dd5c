"""The console of commands: sizes in and out, JSON on stdout, lines on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TextIO, TypeVar

import click

from ...errors import NpuqError
from ...inputs.printable import printable, printable_json
from ...units import format_bytes
from .color import colored
from .log import log

if TYPE_CHECKING:
    from ..ranks import CommandRanks

__all__ = [
    "JSON_SCHEMA",
    "OutputError",
    "Settings",
    "complain",
    "emit_error",
    "emit_json",
    "flush",
    "format_bytes",
    "json_option",
    "one_line",
    "parse_size",
    "say",
    "say_unlogged",
    "show",
    "size",
    "take_no_more",
    "work_is_done",
    "write",
]

# The schema number of --json documents: raised when a key changes its meaning or goes. docs/json.md lists them.
JSON_SCHEMA: Final = 2
# A message may quote a long value of a file.
_MOST_CHARACTERS: Final = 2000
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Parse bytes from `5GB`, `512MiB`, `1e9` or `4096`. Raises ValueError otherwise."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or not 1 <= float(match[1]) * _UNITS[match[2]] < 2**63:
        raise ValueError(f"{text!r} is not a size; write it like 5GB, 512MiB or 4096")
    return int(float(match[1]) * _UNITS[match[2]])


def size(text: str | int) -> int:
    """A click parameter type: sizes such as 5GB."""
    try:
        return parse_size(str(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


@dataclass
class Settings:
    """The values of the options common to all commands, for the handler of errors."""

    command: str = ""
    traceback: bool = False
    json: bool = False
    emitted: bool = False  # a JSON document is on stdout
    ranks: CommandRanks | None = None  # set before the command line is parsed


class OutputError(NpuqError):
    """stdout accepts no more: its reader is gone, or its disk is full."""

    def __init__(self, cause: OSError):
        super().__init__(f"stdout takes no more: {cause.strerror or cause}")
        self.reader_is_gone = isinstance(cause, BrokenPipeError)


_Command = TypeVar("_Command", bound=Callable[..., Any])


def json_option(help_text: str) -> Callable[[_Command], _Command]:
    """Add the option --json to a command, as its parameter `as_json`. With it an error is a JSON document too."""

    def note(context: click.Context, _: click.Parameter, asked: bool) -> bool:
        settings = context.find_object(Settings)
        if settings is not None:
            settings.json = asked
        return asked

    # Eager: read before options that may be wrong.
    return click.option("--json", "as_json", is_flag=True, is_eager=True, callback=note, help=help_text)


def emit_json(value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Print one JSON document on stdout, an object or a list of objects, each with the number of its schema.

    Nothing else may be printed there beside it.
    """
    schema = {"schema": JSON_SCHEMA}
    _emit(schema | dict(value) if isinstance(value, Mapping) else [schema | dict(each) for each in value])
    context = click.get_current_context(silent=True)
    settings = None if context is None else context.find_object(Settings)
    if settings is not None:
        settings.emitted = True


def emit_error(kind: str, message: str, exit_code: int, details: Mapping[str, Any]) -> None:
    """Print the error that ended a command as a JSON document, with what its class adds to it."""
    error = {"type": kind, "message": message, "exit_code": exit_code, **details}
    _emit({"schema": JSON_SCHEMA, "error": error})


def _emit(value: Any) -> None:
    text = printable_json(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        # Characters that the stream cannot encode must be JSON's own escapes, not those of its error handler.
        text = json.dumps(value, indent=2, allow_nan=False)
    write(f"{text}\n")


def show(*lines: object) -> None:
    """Print lines on stdout; quoted text is shortened, and its control characters are escaped."""
    printed = [one_line(str(line)) for line in lines]
    log.add("\n".join(printed))
    write("".join(f"{colored(line, sys.stdout)}\n" for line in printed))


def write(text: str) -> None:
    """Print text on stdout, at once and unchanged. Raises OutputError when stdout refuses."""
    try:
        click.echo(text, nl=False)
    except OSError as cause:
        raise OutputError(cause) from cause


def one_line(text: str) -> str:
    """The text as one printable line; of a long one the beginning and the end."""
    line = printable(text)
    if len(line) > _MOST_CHARACTERS:
        line = f"{line[: _MOST_CHARACTERS // 2]} … {line[-_MOST_CHARACTERS // 2 :]}"
    return line


@contextmanager
def work_is_done() -> Iterator[None]:
    """Guard prints within a command's finished work: a stdout that refuses (its reader is gone, its disk is full) is
    reported on stderr, and does not turn success into a failure."""
    try:
        yield
    except OutputError as error:
        say(f"npuq: the work is done, but {error}")
        take_no_more(sys.stdout)


def say(text: str) -> None:
    """Print one line on stderr, if possible, and into the log."""
    log.add(one_line(text))
    say_unlogged(text)


def say_unlogged(text: str) -> None:
    """Print one line on stderr, if possible, and not into the log."""
    _to_stderr(f"{colored(one_line(text), sys.stderr)}\n")


def complain(text: str) -> None:
    """Print printable text on stderr, if possible."""
    _to_stderr(printable(text, keep="\n"))


def _to_stderr(text: str) -> None:
    with suppress(OSError, ValueError):  # its reader is gone, its disk is full, or it is closed
        click.echo(text, err=True, nl=False)


def flush(stream: TextIO) -> None:
    """Write out the buffer of a stream, if possible."""
    try:
        stream.flush()
    except (OSError, ValueError):
        take_no_more(stream)


def take_no_more(stream: TextIO) -> None:
    """Redirect a refusing stream to /dev/null: the rest of its buffer would fail again when Python exits."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
