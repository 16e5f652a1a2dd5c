"""Import of a module in a child process first: what aborts or hangs there does not end this one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from ...errors import BackendError

SECONDS = 180.0
"""Longest wait for the import: from a slow network file system it takes a minute."""
# The child looks for modules where this process does, and not in the current directory.
_CODE = "import sys; sys.path[:] = sys.argv[2:]; __import__(sys.argv[1])"
_MOST_QUOTED = 200


def trial_import(module: str, version: str) -> None:
    """Import `module` in a child process, which must live through it. version: for the message.

    Raises BackendError where a signal ends the child, and where the import takes more than `SECONDS`. A Python
    exception in the child is none here: this process can import the module and see the exception itself.
    """
    command = [sys.executable, "-c", _CODE, module, *sys.path]
    environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    try:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BackendError(
            f"{module} {version} hangs when it is imported (stopped after {SECONDS:.0f} s): check the driver with "
            "`npu-smi info`, and whether another process holds the NPUs"
        ) from None
    if done.returncode < 0:
        name = signal.strsignal(-done.returncode) or f"signal {-done.returncode}"
        raise BackendError(
            f"{module} {version} ends the process that imports it ({name}{_last_words(done.stderr)}); install it again "
            "beside torch's CPU build, as docs/ascend.md says"
        )


def _last_words(stderr: bytes) -> str:
    """Last words of a dying process: the `what()` of a C++ exception, else its last line."""
    lines = [line.strip() for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("what():")] or lines[-1:]
    return f": {said[0].removeprefix('what():').strip()[:_MOST_QUOTED]}" if said else ""
