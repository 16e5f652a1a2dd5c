"""Limits of parsed data of any syntax: depth, numbers, characters."""

from __future__ import annotations

import math
from typing import Any, Final

MOST_DEPTH: Final = 64
# tokenizer_config.json of many models has model_max_length 10^30, for "none".
_MOST_INTEGER: Final = 10**40


def check_values(value: Any, *, surrogates: bool = True) -> None:
    """Raise ValueError with the reason for a value beyond the limits.

    These are: nesting deeper than MOST_DEPTH, a number that is not finite or has more than 40 digits, a type that JSON
    lacks, and, with `surrogates`, lone surrogates.
    """
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_DEPTH + 1:
            raise ValueError(f"it is nested more than {MOST_DEPTH} levels deep")
        deeper: list[Any] = []
        for item in level:
            kind = type(item)
            if kind is dict:
                deeper.extend(item.values())
                if surrogates:
                    deeper.extend(item)
            elif kind is list:
                deeper.extend(item)
            elif kind is str:
                if surrogates:
                    _check_text(item)
            elif kind is float:
                if not math.isfinite(item):
                    raise ValueError(f"{item} is no number that JSON has")
            elif kind is int:
                if not -_MOST_INTEGER < item < _MOST_INTEGER:
                    raise ValueError("a whole number has more than 40 digits")
            elif item is not None and kind is not bool:
                raise ValueError(f"it holds a {kind.__name__}, which is no plain value")
        level = deeper


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as cause:
        raise ValueError(f"a text holds the lone surrogate U+{ord(text[cause.start]):04X}") from None
