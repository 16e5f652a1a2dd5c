"""Progress of long work at the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .console import format_bytes, progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm


class TerminalProgress:
    """What `convert` tells of itself (npuq.convert.progress.Progress), as a bar and notes on stderr."""

    def __init__(self, action: str, quiet: bool):
        self._action = action
        self._quiet = quiet
        self._bar: tqdm[Any] | None = None

    def __enter__(self) -> TerminalProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def start(self, total_bytes: int, done_bytes: int) -> None:
        self._bar = progress_bar(total_bytes, quiet=self._quiet, description=self._action)
        # What an earlier run did counts as done, not as speed.
        self._bar.initial = self._bar.n = done_bytes
        if done_bytes:
            self.note(f"continuing: {format_bytes(done_bytes)} of {format_bytes(total_bytes)} are done")

    def advance(self, source_bytes: int, layer: int | None) -> None:
        if self._bar is not None and not self._bar.disable:
            self._bar.set_description(self._action if layer is None else f"layer {layer}", refresh=False)
            self._bar.update(source_bytes)

    def note(self, text: str) -> None:
        if not self._quiet:
            if self._bar is not None:
                self._bar.clear()
            click.echo(text, err=True)
