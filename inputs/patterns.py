"""Regular expressions and globs from outside, matched within a limit of time."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from fnmatch import translate
from typing import Final

import regex

from ..errors import NpuqError
from .printable import printable

_MOST_CHARACTERS: Final = 1 << 16
# The compiler writes a counted repetition out, and repetitions multiply: `((a{1000}){1000}){1000}` fills all memory.
_MOST_COMPILED: Final = 1 << 20
_COUNT: Final = re.compile(r"\{([0-9, ]*)\}")
_SECONDS: Final = 5.0


class Pattern:
    """A regular expression in Python's syntax, matched at the beginning of a text as `re.match` does.

    A backtracking engine can take years over a short pattern. All matches of one Pattern together get five seconds,
    which is thousands of times what a checkpoint's names take.
    """

    def __init__(self, expression: str, where: str, error: type[NpuqError]):
        """Compile; `where` names what the expression comes from. Raises `error` when it is no regular expression."""
        self._expression, self._where, self._error = expression, where, error
        self._seconds_left = _SECONDS
        if len(expression) > _MOST_CHARACTERS or _compiled_size(expression) > _MOST_COMPILED:
            raise error(f"{where}: pattern {self._shown} is too long, or its repetitions are")
        try:
            self._compiled = regex.compile(expression, regex.VERSION0)
        except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as cause:
            reason = printable(str(cause))[:80]
            raise error(f"{where}: pattern {self._shown} is no regular expression: {reason}") from cause

    def matches(self, text: str) -> bool:
        """Whether the text begins with a match. Raises the caller's error when the time is used up."""
        started = time.monotonic()
        try:
            if self._seconds_left <= 0:
                raise TimeoutError
            found = self._compiled.match(text, timeout=self._seconds_left)
        except TimeoutError as cause:
            raise self._error(
                f"{self._where}: pattern {self._shown} takes too long to match; write it without nested repetitions"
            ) from cause
        finally:
            self._seconds_left -= time.monotonic() - started
        return found is not None

    @property
    def _shown(self) -> str:
        return printable(repr(self._expression[:80]))


def _compiled_size(expression: str) -> int:
    """A bound of the characters of an expression whose counted repetitions are written out."""
    size = max(1, len(expression))
    for found in _COUNT.finditer(expression):
        numbers = [number.strip() for number in found[1].split(",")]
        size *= max((int(number) for number in numbers if number.isdigit() and len(number) < 10), default=1)
        if any(len(number) >= 10 for number in numbers):
            return _MOST_COMPILED + 1
        if size > _MOST_COMPILED:
            break
    return size


def any_glob(globs: Iterable[str], where: str, error: type[NpuqError]) -> Pattern:
    """A Pattern of the texts that one of the globs (`*`, `?`, `[…]`) matches as a whole."""
    return Pattern("|".join(translate(glob) for glob in globs), where, error)
