"""A process that forks conversions and kills them: the real signal at any system call or moment.

Reads one JSON request a line on stdin and answers with one JSON line on stdout. torch is imported once, here; every
conversion runs in a forked child, so that a run costs milliseconds. A request has `source`, `output`, `options` for
convert_checkpoint (`calibration` as the arguments of CalibrationText), and at most one of
  `kill_at`: SIGKILL before the n-th call that changes the disk,
  `kill_after`: SIGKILL from outside, after so many seconds,
  `signal_at`: [number, signal], a catchable signal before the n-th call,
  `fail_at`: OSError(ENOSPC) from the n-th call and every later one,
  `file_limit`: RLIMIT_FSIZE in bytes,
and `calls`, the names of the calls that count (default: all of CALLS), and `slow`, seconds that each of them takes, so
that the syncer gets its turns.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from npuq.cli.convert import signals_raise
from npuq.convert import CalibrationText, convert_checkpoint
from npuq.convert.conversion import Internals
from npuq.convert.write.pipeline import Durability
from npuq.errors import NpuqError

CALLS = ("pwrite", "write", "ftruncate", "fdatasync", "fsync", "replace", "rename", "unlink", "mkdir")


def main() -> None:
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    for line in sys.stdin:
        request = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            write = os.write  # not the counted one
            answer = run(request)
            write(writer, json.dumps(answer).encode())
            os._exit(0)
        os.close(writer)
        if "kill_after" in request:
            time.sleep(request["kill_after"])
            os.kill(child, signal.SIGKILL)
        with os.fdopen(reader, "rb") as pipe:
            answer = json.loads(pipe.read() or "{}")
        status = os.waitpid(child, 0)[1]
        answer["killed"] = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        print(json.dumps(answer), flush=True)


def run(request: dict[str, Any]) -> dict[str, Any]:
    count = inject(request)
    if "file_limit" in request:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
    before = memory_peak()
    try:
        with signals_raise():
            # The write is looked up late, so that the injected one is used.
            internals = Internals(Durability(0.002, 1 << 30), lambda *arguments: os.pwrite(*arguments))
            options = dict(request.get("options", {}))
            if "calibration" in options:
                options["calibration"] = CalibrationText(*options["calibration"])
            summary = convert_checkpoint(request["source"], request["output"], internals=internals, **options)
    except NpuqError as error:
        return {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code, "calls": count()}
    return {"summary": summary.as_dict(), "calls": count(), "memory": memory_peak() - before}


def inject(request: dict[str, Any]) -> Callable[[], int]:
    """Wrap the counted calls of `os`; returns their number so far."""
    counter, done = itertools.count(1), [0]  # next() of a count is atomic: several workers write

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            done[0] = number = next(counter)
            time.sleep(request.get("slow", 0))
            if number == request.get("kill_at"):
                os.kill(os.getpid(), signal.SIGKILL)
            if "signal_at" in request and number == request["signal_at"][0]:
                os.kill(os.getpid(), request["signal_at"][1])
            if "fail_at" in request and number >= request["fail_at"]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*arguments, **options)

        return counted

    for name in request.get("calls", CALLS):
        setattr(os, name, wrap(name, getattr(os, name)))
    return lambda: done[0]


def memory_peak() -> int:
    """Highest resident memory since the last call, in bytes."""
    with open("/proc/self/status") as file:  # noqa: PTH123
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    with open("/proc/self/clear_refs", "w") as file:  # noqa: PTH123
        file.write("5")
    return peak * 1024


if __name__ == "__main__":
    main()
