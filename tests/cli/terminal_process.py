"""A command in a terminal of its own: what a person types, and what the terminal shows."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
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
        # In another thread's fork, readline could wait for a lock: this process has no such threads.
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            settings = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", **(environment or {})}
            os.execve(sys.executable, [sys.executable, "-m", "npuq", *map(str, arguments)], settings)

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
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self) -> None:
        """End it, if it runs still."""
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self._terminal)

    def read(self, seconds: float) -> bool:
        """Take what comes within so many seconds; False at the end."""
        if not select.select([self._terminal], [], [], seconds)[0]:
            return True
        try:
            piece = os.read(self._terminal, 1 << 16)
        except OSError:  # EIO: its last process has ended
            return False
        self._content += piece
        self.shown = self._content.decode("utf-8", "replace").replace("\r\n", "\n")
        return bool(piece)
