"""JSON of an artifact's large files, indented by one space a level: the text of `json.dumps(content, indent=1,
ensure_ascii=False)`, in pieces.

The standard library's indenting encoder is written in Python, and takes seconds for the names of 180,000 tensors. Its
other encoder is written in C. It indents entries without entries of their own, where separators hold the line break.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import groupby, islice
from typing import Any

# Entries that are encoded at once: joining those of 180,000 names would take several times the memory of the text.
_TOGETHER = 1024


def json_pieces(content: Any) -> Iterator[str]:
    """Yield the text in pieces, with a line break at its end.

    Raises TypeError for what JSON cannot hold, RecursionError where it is nested too deeply.
    """
    yield from _pieces(content, 0)
    yield "\n"


def _pieces(value: Any, depth: int) -> Iterator[str]:
    encode = _encoder(depth)
    if _is_flat((None, value)):
        yield encode(value)
        return
    named, line = isinstance(value, dict), f"\n{' ' * (depth + 1)}"
    entries: Iterable[tuple[Any, Any]] = value.items() if named else ((None, each) for each in value)
    before = f"{'{' if named else '['}{line}"
    for flat, group in groupby(entries, _is_flat):
        # A nested entry goes by itself.
        while run := list(islice(group, _TOGETHER if flat else 1)):
            if flat:
                yield before + encode(dict(run) if named else [each for _, each in run])[1:-1]
            else:
                [(name, nested)] = run
                yield before + encode({name: None}).removeprefix("{").removesuffix("null}") if named else before
                yield from _pieces(nested, depth + 1)
            before = f",{line}"
    yield f"\n{' ' * depth}{'}' if named else ']'}"


def _is_flat(entry: tuple[Any, Any]) -> bool:
    return not isinstance(entry[1], dict | list | tuple) or not entry[1]


@cache
def _encoder(depth: int) -> Callable[[Any], str]:
    """The encoding of one value at a depth, and of what is one level deeper with line breaks before each entry."""
    return json.JSONEncoder(ensure_ascii=False, separators=(f",\n{' ' * (depth + 1)}", ": ")).encode
