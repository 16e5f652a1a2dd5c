"""What commands that talk to a hub share: a progress bar by bytes, and models that may be repositories."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .console import format_bytes, progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm


class TransferBar:
    """Progress of a push or a pull, as a bar and notes on stderr."""

    def __init__(self, description: str, quiet: bool):
        self._description = description
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None
        self.total_bytes = 0

    def __enter__(self) -> TransferBar:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total_bytes: int) -> None:
        self.total_bytes = total_bytes
        if total_bytes:
            self._bar = progress_bar(total_bytes, quiet=self._quiet, description=self._description)

    def advance(self, count: int) -> None:
        if self._bar is not None:
            self._bar.update(count)

    def note(self, text: str) -> None:
        if not self._quiet:
            if self._bar is not None:
                self._bar.clear()
            click.echo(text, err=True)


def local_model(model: str | Path, *, quiet: bool) -> Path:
    """The directory of a MODEL argument; `user/repo` is fetched from the hub first."""
    if Path(model).exists():
        return Path(model)
    from ..hub import resolve

    silence_client()
    with TransferBar("pull", quiet) as bar:
        path = resolve(model, progress=bar)
    if bar.total_bytes:
        bar.note(f"{model}: {format_bytes(bar.total_bytes)} fetched to {path}")
    return path


def silence_client() -> None:
    """Only our own bar: huggingface_hub would draw one a file, and warn of each retry."""
    import logging

    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
