"""The option of commands that read checkpoints: --as, for a model_type that npuq does not know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])


def as_option(what: str) -> Callable[[Command], Command]:
    """Option of a command: --as FAMILY, which arrives as `family`; `what` is the argument that it is about."""
    return click.option(
        "--as",
        "family",
        metavar="FAMILY",
        callback=_known,
        shell_complete=_families,
        help=f"Read {what} as a model of this family, where config.json has an unknown model_type.",
    )


def beginning(names: Sequence[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Completion by the shell for an option whose values are often these names, and may be others."""
    return lambda context, parameter, begun: [name for name in names if name.startswith(begun)]


def known_type(family: str | None) -> Callable[[Path], None]:
    """Make a check for `local_model`, before a repository's weights are fetched: a config.json of unknown model_type is
    refused, where no --as says what it is. Where the weights are there already, their reader says what they look like.
    """

    def check(directory: Path) -> None:
        from ...errors import UnknownModelError
        from ...formats.checkpoint import read_config
        from ...models.families import is_known, unknown_type

        stated = read_config(directory).get("model_type")
        if family is None and not is_known(stated) and not any(directory.glob("*.safetensors")):
            raise UnknownModelError(
                f"{directory}: {unknown_type(stated)}; no weights were fetched: --as FAMILY reads it as one of those",
                (),
            )

    return check


def _families(context: click.Context, parameter: click.Parameter, begun: str) -> list[str]:
    """The families that begin so, for the shell."""
    from ...models.families import FAMILIES

    return [name for name in sorted(FAMILIES) if name.startswith(begun)]


def _known(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Check the name; another is wrong usage."""
    from ...models.families import FAMILIES, is_known

    if value is not None and not is_known(value):
        raise click.BadParameter(f"{value!r} is no family; npuq knows {', '.join(sorted(FAMILIES))}")
    return value
