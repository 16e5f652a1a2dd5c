"""The log of a command, a file: `npuq --log-file FILE COMMAND …`.

It holds what a command tells (notes, warnings, progress, results, the error), each line with its time, whatever the
terminal shows. It does not hold generated text. A log that refuses a line never ends the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from ...inputs.printable import printable

_SECRETS: Final = ("--token",)


class Log:
    """Lines with times, appended to a file; nothing before `open`. Several processes may write to one file."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._prefix = ""

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def open(self, path: Path, prefix: str = "") -> None:
        """Append to a file from now on; `prefix` begins every line. Raises OSError."""
        # A named pipe that nobody reads refuses, and does not wait.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
        self._file, self._prefix = os.open(path, flags, 0o666), prefix

    def add(self, text: str) -> None:
        """Append each line of a text, if the log is open."""
        if self._file is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        lines = "".join(f"{now} {self._prefix}{printable(line)}\n" for line in text.splitlines())
        try:
            os.write(self._file, lines.encode("utf-8", "backslashreplace"))  # in one call: lines stay whole
        except OSError:
            return

    def close(self) -> None:
        """End the log."""
        if self._file is not None:
            os.close(self._file)
        self._file = None


log: Final = Log()
"""The log of this process's command."""


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command, with stars for a token."""
    shown: list[str] = []
    for argument in arguments:
        option = argument.partition("=")[0]
        if shown and shown[-1] in _SECRETS:
            shown.append("***")
        else:
            shown.append(f"{option}=***" if option in _SECRETS and "=" in argument else argument)
    return shown
