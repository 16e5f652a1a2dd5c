"""Options that several commands share, or that belong together, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import wraps
from typing import Any, TypeVar

Command = TypeVar("Command", bound=Callable[..., Any])
Option = Callable[[Any], Any]


def gathered(name: str, kind: type[Any], options: Sequence[Option]) -> Callable[[Command], Command]:
    """Add options to a command; they arrive together as the parameter `name`, a dataclass whose fields they are."""
    names = [field.name for field in fields(kind)]

    def add(command: Command) -> Command:
        @wraps(command)
        def with_values(*arguments: Any, **given: Any) -> Any:
            return command(*arguments, **{name: kind(**{each: given.pop(each) for each in names})}, **given)

        added: Any = with_values
        for option in reversed(options):
            added = option(added)
        found: Command = added
        return found

    return add
