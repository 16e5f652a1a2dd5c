"""What a conversion tells of itself while it runs. The command line draws a bar; a library caller hears nothing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of a conversion, in the calling thread."""

    def start(self, total_bytes: int, done_bytes: int) -> None:
        """Work begins: bytes of source in all, and how many of them an earlier run has done."""

    def advance(self, source_bytes: int, layer: int | None) -> None:
        """One tensor is converted; `layer` is None outside the decoder layers."""

    def note(self, text: str) -> None:
        """One line for the user: a warning, or what is being done."""


class Silent:
    """Progress that nobody watches."""

    def start(self, total_bytes: int, done_bytes: int) -> None:
        return

    def advance(self, source_bytes: int, layer: int | None) -> None:
        return

    def note(self, text: str) -> None:
        return
