"""Conversion of Python values to JSON's own types, or a refusal that names the value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import NpuqError
from .printable import printable
from .values import MOST_DEPTH, check_values


def json_value(value: Any, name: str, error: type[NpuqError]) -> Any:
    """Copy a value into JSON's own types: dict, list, str, int, float, bool, None.

    Other mappings become dicts, tuples lists, and subclasses of a plain type that type. `name` is the value's name in
    errors. Raises `error` for any other type, keys that are not text, deep nesting, numbers that are not finite or have
    more than 40 digits, and lone surrogates.
    """
    plain = _plain(value, name, 0, error)
    try:
        check_values(plain)
    except ValueError as cause:
        raise error(f"{name or 'values'}: {cause}") from cause
    return plain


def _plain(value: Any, name: str, depth: int, error: type[NpuqError]) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MOST_DEPTH:
        raise error(f"{name}: nested more than {MOST_DEPTH} levels deep")
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise error(f"{name}: the key {printable(repr(key))[:80]} is not text")
        return {
            str.__str__(key): _plain(item, f"{name}.{key}" if name else str(key), depth + 1, error)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}[{index}]", depth + 1, error) for index, item in enumerate(value)]
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise error(f"{name}: a {type(value).__name__} is not JSON; give text, numbers, lists and dicts")
