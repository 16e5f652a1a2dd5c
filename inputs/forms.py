"""The form of parsed data: which keys there are, and of which types their values. What does not fit is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, Union

from ..errors import NpuqError
from .printable import printable

Form: TypeAlias = Union[Callable[[Any], bool], "Keys", "Each", "Items"]
"""A test of one value, or what a container holds."""


@dataclass(frozen=True)
class Keys:
    """An object whose keys, where they are there, have these forms; those of `required` are there. Others may be."""

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
    """Raise `error` when the value has another form: `where`, and the path to the first thing that is wrong."""
    path = _wrong(value, form)
    if path is not None:
        what = printable(".".join(path))[:200] or "its content"
        raise error(f"{where}: damaged: {what} is not of the right kind; fetch it again, or make it again")


def is_text(value: Any) -> bool:
    """A text."""
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    """A whole number of 63 bits that is not negative, and no truth value."""
    return type(value) is int and 0 <= value < 1 << 63


def is_number(value: Any) -> bool:
    """A number that is not negative, and no truth value. JSON's and YAML's readers let only finite ones in."""
    return type(value) in (int, float) and value >= 0


def optional(form: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A value of a form, or null."""
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
