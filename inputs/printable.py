"""Escapes of text from outside, so that a terminal can show it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Final

# Control characters (C0, DEL, C1), line and paragraph separators, marks that reorder a line, surrogates, and invisible
# characters: interlinear annotations, and tags, in which a line can hide another text.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)


def printable(text: str, keep: str = "") -> str:
    """Escape every character that could control a terminal or reorder a line, as in `\\x1b`.

    Those in `keep` (`"\\n\\t"`, say) stay.
    """
    if text.isprintable():
        return text
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def printable_json(text: str) -> str:
    """Replace such characters in a JSON text with JSON's own escapes: the value is the same. Line ends stay."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1], text)


def shown(value: object, most: int = 60) -> str:
    """The beginning of a value's repr, printable, for a message."""
    try:
        return printable(repr(value))[:most]
    except ValueError:  # a whole number too long to be written
        return f"of type {type(value).__name__}"


def error_line(error: BaseException, most: int = 200) -> str:
    """The beginning of a foreign error's message, printable and on one line; its type's name where it says nothing."""
    return printable(" ".join(str(error).split()))[:most] or type(error).__name__


def name_as_text(path: Path) -> str:
    """The last part of a path as UTF-8 text; bytes that are no UTF-8 become `\\xNN`."""
    return printable(os.fsencode(path.name).decode("utf-8", "backslashreplace"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
