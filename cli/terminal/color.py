"""Colours of lines on a terminal: where they are wanted, and which line gets which."""

from __future__ import annotations

import os
from typing import Final, TextIO

BOLD_RED: Final = "\x1b[1;31m"
YELLOW: Final = "\x1b[33m"
DIM: Final = "\x1b[2m"
PLAIN: Final = "\x1b[0m"

# The words that lines begin with.
_PREFIXES: Final = {"npuq: error:": BOLD_RED, "problem:": BOLD_RED, "note:": YELLOW}


def wants_color(stream: TextIO | None) -> bool:
    """True for a terminal, unless NO_COLOR is set (https://no-color.org) or TERM is dumb."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # closed
        return False


def colored(line: str, stream: TextIO | None) -> str:
    """The line with its first words in colour, where it has such and the stream wants colours."""
    for prefix, color in _PREFIXES.items():
        if line.startswith(prefix) and wants_color(stream):
            return f"{color}{prefix}{PLAIN}{line[len(prefix) :]}"
    return line
