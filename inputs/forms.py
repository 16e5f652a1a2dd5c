"""Forms of parsed data: its keys and the types of their values. The error names the path of the first mismatch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

from ..errors import NpuqError
from .printable import printable

Form: TypeAlias = Union[Callable[[Any], bool], "Keys", "Each", "Items"]
"""A test of one value, or the forms of a container's values."""


@dataclass(frozen=True)
class Keys:
    """An object: the forms of its known keys, and the `required` ones among them. Other keys are allowed."""

    forms: Mapping[str, Form]
    required: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Each:
    """An object whose values all have one form, and whose keys pass a test."""

    form: Form
    key: Callable[[str], bool] = bool


@dataclass(frozen=True)
class Items:
    """A list whose items all have one form."""

    form: Form


def check_form(value: Any, form: Form, where: str, error: type[NpuqError]) -> None:
    """Raise `error` when the value has another form; the message is `where` and the path of the first mismatch."""
    path = _wrong(value, form)
    if path is not None:
        what = printable(".".join(path))[:200] or "its content"
        raise error(f"{where}: damaged: {what} is not of the right kind; fetch it again, or make it again")


def is_text(value: Any) -> bool:
    """True for a text."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """True for a whole number from 0 to 2**63 − 1 that is no truth value."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> bool:
    """True for a number from 0 on that is no truth value. The readers of JSON and YAML refuse infinities and NaN."""
    return type(value) in (int, float) and value >= 0


def is_finite(value: Any) -> bool:
    """True for a finite number that is no truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def optional(form: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The form of a value or null."""
    return lambda value: value is None or form(value)


def _wrong(value: Any, form: Form) -> list[str] | None:
    """The path to the first value of another form; None when there is none."""
    if isinstance(form, Keys):
        return _wrong_key(value, form)
    if isinstance(form, Each):
        if not isinstance(value, dict):
            return []
        for key, item in value.items():
            path = _wrong(item, form.form) if form.key(key) else []
            if path is not None:
                return [key, *path]
        return None
    if isinstance(form, Items):
        if not isinstance(value, list):
            return []
        for number, item in enumerate(value):
            path = _wrong(item, form.form)
            if path is not None:
                return [str(number), *path]
        return None
    return None if form(value) else []


def _wrong_key(value: Any, form: Keys) -> list[str] | None:
    if not isinstance(value, dict):
        return []
    for key, inner in form.forms.items():
        if key not in value:
            if key in form.required:
                return [key]
            continue
        path = _wrong(value[key], inner)
        if path is not None:
            return [key, *path]
    return None
