"""A command in a terminal of its own: what a person types, and what the terminal shows."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

SECONDS = 120
"""Patience: the machine may be busy."""


class TerminalProcess:
    """`python -m npuq` with these arguments. `shown`: all that the terminal got so far, line ends as `\\n`."""

    def __init__(self, *arguments: Any, environment: Mapping[str, str] | None = None):
        self.shown = ""
        self._seen = 0
        self._content = b""
        self._terminal, self._other = pty.openpty()
        # The shell opens the terminal: a session's leader gets the first one that it opens as its own.
        line = f'exec "$@" < {os.ttyname(self._other)} > {os.ttyname(self._other)} 2>&1'
        self._process = subprocess.Popen(
            ["bash", "-c", line, "bash", sys.executable, "-m", "npuq", *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", **(environment or {})},
            start_new_session=True,
        )

    def type(self, text: str) -> None:
        """Type text; a line ends with `\\n`, Ctrl-C is `\\x03`."""
        os.write(self._terminal, text.encode())

    def expect(self, pattern: str) -> str:
        """Wait until the terminal shows what the pattern finds, behind what was found before; return the text up to
        its end."""
        deadline = time.monotonic() + SECONDS
        while True:
            found = re.search(pattern, self.shown[self._seen :])
            if found:
                text = self.shown[self._seen :][: found.end()]
                self._seen += found.end()
                return text
            assert time.monotonic() < deadline and self.read(1.0), f"no {pattern!r} in {self.shown[self._seen :]!r}"

    def wait(self) -> int:
        """The exit code, after the end."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and self.read(1.0):
            continue
        return self._process.wait(SECONDS)

    def kill(self) -> None:
        """End it, if it runs still."""
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)
        os.close(self._other)

    def read(self, seconds: float) -> bool:
        """Take what comes within so many seconds; False when it has ended and nothing comes any more."""
        ended = self._process.poll() is not None
        if not select.select([self._terminal], [], [], 0 if ended else seconds)[0]:
            return not ended
        self._content += os.read(self._terminal, 1 << 16)
        self.shown = self._content.decode("utf-8", "replace").replace("\r\n", "\n")
        return True
