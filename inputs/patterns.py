"""Regular expressions and globs from outside, compiled and matched within a limit of time."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from fnmatch import translate
from typing import Final

import regex

from ..errors import NpuqError
from .printable import printable

_MOST_CHARACTERS: Final = 1 << 16
# The compiler unrolls counted repetitions, and nested ones multiply: `((a{1000}){1000}){1000}` fills all memory.
_MOST_COMPILED: Final = 1 << 20
_COUNT: Final = re.compile(r"\{([0-9, ]*)\}")
_SECONDS: Final = 5.0


class Budget:
    """The processor time, in seconds, that several patterns share.

    Wall-clock time would charge patterns for other load on the machine.
    """

    def __init__(self) -> None:
        self.seconds_left = _SECONDS


class Pattern:
    """A regular expression in Python's syntax, matched at the beginning of a text as `re.match` does.

    A backtracking engine can take years over a short pattern. All matches of one Pattern, or of all that share a
    Budget, get five seconds together; the 45,000 linears of DeepSeek-V3 take a tenth of a second a pattern.
    """

    def __init__(self, expression: str, where: str, error: type[NpuqError], budget: Budget | None = None):
        """Compile; `where` names the expression's origin. Raises `error` when it is no regular expression."""
        self._expression, self._where, self._error = expression, where, error
        self._budget = budget or Budget()
        if len(expression) > _MOST_CHARACTERS or _compiled_size(expression) > _MOST_COMPILED:
            raise error(f"{where}: pattern {self._shown} is too long, or its repetitions are")
        started = time.thread_time()
        try:
            self._check_budget()
            self._compiled = regex.compile(expression, regex.VERSION0)
            self._budget.seconds_left -= time.thread_time() - started
        except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as cause:
            reason = printable(str(cause))[:80]
            raise error(f"{where}: pattern {self._shown} is no regular expression: {reason}") from cause

    def matches(self, text: str) -> bool:
        """True where the text begins with a match. Raises the caller's error when the time is used up."""
        started = time.thread_time()
        self._check_budget()
        try:
            return self._compiled.match(text, timeout=self._budget.seconds_left) is not None
        except TimeoutError as cause:
            # The library counts the time of all threads, not of this one.
            self._budget.seconds_left = 0.0
            raise self._too_slow() from cause
        finally:
            self._budget.seconds_left -= time.thread_time() - started

    def _check_budget(self) -> None:
        if self._budget.seconds_left <= 0:
            raise self._too_slow()

    def _too_slow(self) -> NpuqError:
        return self._error(
            f"{self._where}: pattern {self._shown} takes too long to match; write it without nested repetitions"
        )

    @property
    def _shown(self) -> str:
        return printable(repr(self._expression[:80]))


def _compiled_size(expression: str) -> int:
    """An upper bound of an expression's characters with its counted repetitions unrolled."""
    size = max(1, len(expression))
    for found in _COUNT.finditer(expression):
        numbers = [number.strip() for number in found[1].split(",")]
        size *= max((int(number) for number in numbers if number.isdigit() and len(number) < 10), default=1)
        if any(len(number) >= 10 for number in numbers):
            return _MOST_COMPILED + 1
        if size > _MOST_COMPILED:
            break
    return size


class Globs:
    """Globs (`*`, `?`, `[…]`), of which at least one must match a whole text.

    Python's translation of globs never backtracks, so that they need no time limit.
    """

    def __init__(self, globs: Sequence[str], where: str, error: type[NpuqError]):
        """Compile. Raises `error`, beginning with `where`, for a malformed or too long glob."""
        if sum(map(len, globs)) > _MOST_CHARACTERS:
            raise error(f"{where}: the names are too long: {_MOST_CHARACTERS} characters are read")
        try:
            self._compiled = re.compile("|".join(map(translate, globs)))
        except (re.error, ValueError, OverflowError, RecursionError) as cause:
            reason = printable(str(cause))[:80]
            raise error(f"{where}: {printable(repr(list(globs))[:80])} cannot be matched: {reason}") from cause

    def matches(self, text: str) -> bool:
        """True where a glob matches the whole text."""
        return self._compiled.match(text) is not None
