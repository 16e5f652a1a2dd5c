"""JSON from outside: parsed with limits of size, depth and numbers, or refused in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import NpuqError
from .files import MOST_BYTES, read_bytes
from .printable import printable
from .values import check_values

# In UTF-8 a lone surrogate can only come from an escape; valid pairs match too.
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Pairs = Callable[[list[tuple[str, Any]]], Any]


def parse_json(content: bytes | str, where: str, error: type[NpuqError], pairs: Pairs | None = None) -> Any:
    """Parse a JSON text; `where` names its file, `pairs` is json's `object_pairs_hook`.

    Raises `error` for text that is not JSON in UTF-8, deep nesting, NaN, infinity, numbers of more than 40 digits and
    lone surrogates.
    """
    try:
        if isinstance(content, str):  # bytes of a command line that are no UTF-8 arrive as surrogates
            content = content.encode("utf-8")
        text = content.decode("utf-8")
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=pairs)
        check_values(value, surrogates=_SURROGATE.search(text) is not None)
    except RecursionError as cause:
        raise error(f"{where}: not valid JSON: it is nested too deeply") from cause
    except ValueError as cause:  # json.JSONDecodeError and UnicodeDecodeError among them
        raise error(f"{where}: not valid JSON: {printable(str(cause))[:120]}") from cause
    return value


def parse_object(
    content: bytes | str, where: str, error: type[NpuqError], pairs: Pairs | None = None
) -> dict[str, Any]:
    """Parse a JSON object; otherwise as `parse_json`."""
    value = parse_json(content, where, error, pairs)
    if not isinstance(value, dict):
        raise error(f"{where}: not a JSON object")
    return value


def read_object(path: Path, error: type[NpuqError], most: int = MOST_BYTES) -> dict[str, Any]:
    """Read a JSON object from a regular file of at most `most` bytes. Raises `error`."""
    return parse_object(read_bytes(path, error, most), str(path), error)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON has")
