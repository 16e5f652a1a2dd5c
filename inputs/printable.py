"""Text from outside as a terminal may show it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

# Control characters (C0, DEL, C1), line and paragraph separators, marks that reorder a line, surrogates.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, keep: str = "") -> str:
    """`text` with every character that could command a terminal or reorder a line as its escape, such as `\\x1b`.

    Those in `keep` (`"\\n\\t"`, say) stay.
    """
    if text.isprintable():
        return text
    return _UNSAFE.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def printable_json(text: str) -> str:
    """A JSON text with such characters as JSON's own escapes: the same value. Line ends stay."""
    return _UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text)


def name_as_text(path: Path) -> str:
    """The last part of a path, as text that any file can hold: bytes that are no UTF-8 as `\\xNN`."""
    return printable(os.fsencode(path.name).decode("utf-8", "backslashreplace"))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
