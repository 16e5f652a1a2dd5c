"""Jinja templates from outside, rendered in a child process with limits of time, memory and size.

Jinja's sandbox protects Python's internals, but limits no work: two nested loops run for hours, one filter takes all
memory, and nothing within the process can stop either. A child process takes about 0.1 s to start and a fraction of a
millisecond for each text.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import Any, Final

from ..errors import NpuqError
from .json_value import json_value
from .printable import printable

SECONDS: Final = 10
MOST_MEMORY: Final = 512 << 20
MOST_CHARACTERS: Final = 32 << 20

_START_SECONDS: Final = 60
_MOST_HEADER: Final = 32
_WORKER: Final = Path(__file__).with_name("template_worker.py")
# The variables that a Python may need to start. A process that runs downloaded templates gets no others (tokens, keys).
_ENVIRONMENT: Final = ("LD_LIBRARY_PATH", "TZ")


class TemplateRenderer:
    """Renders templates in a child process, which starts with the first template and serves one thread at a time.

    Templates get the environment of transformers' own renderer: `raise_exception`, `strftime_now`, `tojson`,
    `{% generation %}`, `{% break %}`, and the call's variables. A process that reaches a limit is ended, and the next
    text starts another. After a fork, parent and child use separate processes.
    """

    def __init__(self, error: type[NpuqError], limit_error: type[NpuqError] | None = None, seconds: float = SECONDS):
        """error: the class that `render` raises. limit_error: the class for a reached limit; None: `error`.

        seconds: the time limit of one text.
        """
        self._error = error
        self._limit_error = limit_error or error
        self._seconds = seconds
        self._forget()

    def render(self, template: str, values: Mapping[str, Any], where: str) -> str:
        """Render a template from `where` with variables of JSON's types.

        Raises the caller's error in one line when the template fails or reaches a limit: 10 seconds, 512 MiB of
        memory, 32 Mi characters.
        """
        request = _encode(template, values, self._error)
        if self._owner != os.getpid():
            self._forget()
        with self._lock:
            if self._process is None:
                self._start(where)
            try:
                kind, payload = self._exchange(request, self._seconds)
            except TimeoutError:
                kind, payload = "L", f"it takes more than {self._seconds:g} seconds".encode()
            except (EOFError, OSError, ValueError):
                kind, payload = "L", self._fate().encode()
            except BaseException:  # an interruption between a request and its reply
                self._end()
                raise
            if kind != "T":
                error = self._error
                if kind == "L":
                    error = self._limit_error
                    self._end()
                reason = printable(" ".join(payload.decode(errors="replace").split()))[:300]
                raise error(f"{where}: the chat template failed: {reason}")
        return payload.decode("utf-8")

    def close(self) -> None:
        """End the child process. A later `render` starts another."""
        with self._lock:
            self._end()

    def _forget(self) -> None:
        """Drop the process after a fork: it belongs to the parent."""
        self._owner = os.getpid()
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._finalizer: weakref.finalize[..., TemplateRenderer] | None = None

    def _start(self, where: str) -> None:
        # The child's own alarm is for a killed parent; this process's limit comes first.
        limits = (int(self._seconds) + 2, MOST_MEMORY, MOST_CHARACTERS)
        try:
            self._process = subprocess.Popen(
                # Isolated: no user's site-packages, nothing from the current directory.
                [sys.executable, "-I", "-S", str(_WORKER), *map(str, limits), *_jinja_folders()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                cwd="/",
                env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                start_new_session=True,  # the terminal's Ctrl-C must not reach it
            )
        except (OSError, ImportError, TypeError, ValueError) as cause:
            raise self._error(f"{where}: no process for the chat template can be started: {cause}") from cause
        self._finalizer = weakref.finalize(self, _end, self._process, self._owner)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
        try:
            kind, _ = self._exchange(b"", _START_SECONDS)
        except (TimeoutError, EOFError, OSError, ValueError):
            kind = ""
        except BaseException:
            self._end()
            raise
        if kind != "R":
            fate = self._fate()
            self._end()
            raise self._error(f"{where}: the process for the chat template did not start: {fate}")

    def _exchange(self, request: bytes, seconds: float) -> tuple[str, bytes]:
        """Send a request and read the reply's kind and payload. Raises TimeoutError; EOFError or OSError when the
        process ended."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        to_child, from_child = process.stdin.fileno(), process.stdout.fileno()
        poll = select.poll()
        poll.register(from_child, select.POLLIN)
        if request:
            poll.register(to_child, select.POLLOUT)
        left, reply = memoryview(request), bytearray()
        deadline = time.monotonic() + seconds
        while True:
            left_seconds = deadline - time.monotonic()
            ready = dict(poll.poll(1000 * left_seconds)) if left_seconds > 0 else {}
            if not ready:
                raise TimeoutError
            if to_child in ready:
                left = left[os.write(to_child, left[: 1 << 16]) :]
                if not left:
                    poll.unregister(to_child)
            if from_child in ready:
                piece = os.read(from_child, 1 << 16)
                if not piece:
                    raise EOFError
                reply += piece
                if (message := _message(reply)) is not None:
                    return message

    def _fate(self) -> str:
        """The end of the child process as text, after its pipe has closed."""
        assert self._process is not None
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "its process no longer answers"
        return f"its process ended with {f'signal {-code}' if code < 0 else f'status {code}'}"

    def _end(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None


def _encode(template: str, values: Mapping[str, Any], error: type[NpuqError]) -> bytes:
    """Encode a request for the worker. Raises `error` for values that are not JSON."""
    body = json.dumps({"template": template, "values": json_value(dict(values), "", error)}).encode()
    return b"%d\n%b" % (len(body), body)


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _message(reply: bytearray) -> tuple[str, bytes] | None:
    """Parse a reply's kind and payload; None while it is incomplete. ValueError for bytes that are no reply."""
    end = reply.find(b"\n", 0, _MOST_HEADER)
    if end < 0:
        if len(reply) >= _MOST_HEADER:
            raise ValueError("no reply")
        return None
    kind, length = bytes(reply[:end]).decode("ascii").split(" ")
    size = int(length)
    if not 0 <= size <= 4 * MOST_CHARACTERS:
        raise ValueError("no reply")
    body = len(reply) - end - 1
    return (kind, bytes(reply[end + 1 :])) if body == size else None


def _jinja_folders() -> list[str]:
    """The folders that jinja2 and its imports are installed in. ImportError when they are not."""
    folders = []
    for name in ("jinja2", "markupsafe"):
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ImportError(f"{name} is not installed")
        folders.append(str(Path(spec.origin).parent.parent))
    return list(dict.fromkeys(folders))
