"""What commands share at the terminal: sizes in and out, JSON on stdout, progress on stderr."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any

import click

from ..units import format_bytes

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["emit_json", "format_bytes", "parse_size", "progress_bar", "size"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str) -> int:
    """Bytes from `5GB`, `512MiB`, `1e9` or `4096`; ValueError otherwise."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in _UNITS or not 0 < float(match[1]) * _UNITS[match[2]] < 2**63:
        raise ValueError(f"{text!r} is not a size; write it like 5GB, 512MiB or 4096")
    return int(float(match[1]) * _UNITS[match[2]])


def size(text: str | int) -> int:
    """A click parameter type: sizes such as 5GB."""
    try:
        return parse_size(str(text))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def emit_json(value: Any) -> None:
    """One JSON document on stdout; nothing else may be printed there beside it."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def progress_bar(total: int, *, quiet: bool, description: str, unit: str = "B") -> tqdm[Any]:
    """A tqdm bar on stderr: bytes, rate, ETA. Silent with `quiet` and where stderr is no terminal."""
    from tqdm import tqdm

    shown = not quiet and sys.stderr.isatty()
    # Terminals of `script`, of containers and of CI often say that they have no size: tqdm would draw nothing there.
    sized = shown and all(os.get_terminal_size(sys.stderr.fileno()))
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        unit_scale=True,
        disable=not shown,
        file=sys.stderr,
        dynamic_ncols=sized,
        ncols=None if sized else 80,
        nrows=None if sized else 24,
    )
