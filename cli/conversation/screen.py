"""What a conversation prints: answers on stdout, all else on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress

from ...inputs.printable import printable
from ..terminal.color import DIM, PLAIN, wants_color
from ..terminal.console import complain, say, write
from .chat_model import Delta


class Screen:
    """Prints answers as they come, without the control characters of a model or a server.

    On a terminal an answer's reasoning comes before it, dimmed where colours are wanted (NO_COLOR), else between
    lines that say so. A file or a pipe gets the answers alone.
    """

    def __init__(self, *, reasoning: bool = True, answers: bool = True):
        self.is_terminal = sys.stdout.isatty()
        self.answers = answers
        self._styled = wants_color(sys.stdout)
        self._reasoning = reasoning and self.is_terminal
        self._in_reasoning = False
        self._last = "\n"

    def note(self, text: str) -> None:
        """Print a line on stderr."""
        say(text)

    def show(self, delta: Delta) -> None:
        """Print the next text of an answer."""
        if delta.reasoning and self._reasoning:
            if not self._in_reasoning:
                self._in_reasoning = True
                self._write(DIM if self._styled else "[reasoning]\n")
            self._text(delta.reasoning)
        if delta.content:
            self._end_reasoning()
            self._text(delta.content)

    def end(self) -> None:
        """End the answer's last line, and on a terminal leave one free."""
        self._end_reasoning()
        if self._last != "\n":
            self._write("\n")
        if self.is_terminal:
            self._write("\n")
        self._last = "\n"

    def _end_reasoning(self) -> None:
        if self._in_reasoning:
            self._in_reasoning = False
            if self._styled:
                self._write(PLAIN)
            self._write("\n" if self._last == "\n" else "\n\n")
            if not self._styled:
                self._write("[answer]\n")
            self._last = "\n"

    def _text(self, text: str) -> None:
        self._write(printable(text, keep="\n\t"))
        self._last = text[-1]

    def _write(self, text: str) -> None:
        if self.answers:
            write(text)


def ask(prompt: str) -> Callable[[], str]:
    """Make a function that reads a line of the terminal, with editing and history where Python has readline."""
    with suppress(ImportError):
        import readline  # noqa: F401  (input() uses it once it is imported)
    if sys.stdout.isatty():
        return lambda: input(prompt)

    def without_echo() -> str:
        complain(prompt)
        return input()

    return without_echo
