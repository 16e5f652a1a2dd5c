"""Progress of a transfer. The command line draws a bar; a library caller hears nothing."""

from __future__ import annotations

from typing import Protocol


class TransferProgress(Protocol):
    """Receives the progress of a push or a pull, from several threads."""

    def start(self, total_bytes: int) -> None:
        """Bytes that will be transferred."""

    def advance(self, count: int) -> None:
        """So many more bytes are transferred."""

    def note(self, text: str) -> None:
        """One line for the user."""


class Silent:
    """Progress that nobody watches."""

    def start(self, total_bytes: int) -> None:
        return

    def advance(self, count: int) -> None:
        return

    def note(self, text: str) -> None:
        return
