"""A child process that works through numbered cases and prints an event, a JSON object a line, for each step."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

_MOST_ERRORS: Final = 6000


@dataclass
class Report:
    """How many cases began, how they ended, and what must not be."""

    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Child:
    """How a child is started, and for how long it may be silent.

    script: is given `--child` and the arguments as JSON, with the first number as `first`. named: what a finding says
    of a case, from its number. Events have `number` and either `what`, when the case begins, or `outcome`, and of an
    outcome "finding" also `message`.
    """

    script: Path
    arguments: Mapping[str, Any]
    environment: Mapping[str, str]
    seconds: float
    named: Callable[[int], str]

    def run(
        self, first: int, end: int | None, until: float | None, report: Report, told: Callable[[str], object]
    ) -> int:
        """Run cases `first` and on until the child ends, or `time.monotonic()` is `until`; the number to go on with."""
        command = [
            sys.executable,
            str(self.script),
            "--child",
            json.dumps({**self.arguments, "first": first, "end": end}),
        ]
        number, what = first, "start"

        def found(problem: str) -> None:
            report.findings.append(f"{self.named(number)} ({what}): {problem}")
            told(report.findings[-1])

        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=dict(self.environment)
            )
            for line in self._lines(child):
                if line is None or (until is not None and time.monotonic() > until):
                    child.send_signal(signal.SIGABRT)  # faulthandler says where it was
                    child.wait()
                    if line is None:
                        found(f"no end after {self.seconds:g} s\n{_end_of(errors)}")
                    return number + 1
                event = json.loads(line)
                number = event["number"]
                if "what" in event:
                    what = event["what"]
                    report.cases += 1
                    continue
                report.outcomes[event["outcome"]] += 1
                if event["outcome"] == "finding":
                    found(event["message"])
            if child.wait() == 0 and end is not None:
                return end
            found(f"exit status {child.returncode}\n{_end_of(errors)}")
            return number + 1

    def _lines(self, child: subprocess.Popen[str]) -> Iterator[str | None]:
        """What the child prints; None when it is silent for too long."""
        lines: queue.Queue[str] = queue.Queue()

        def read(stream: IO[str]) -> None:
            for line in stream:
                lines.put(line)
            lines.put("")

        assert child.stdout is not None
        threading.Thread(target=read, args=(child.stdout,), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=self.seconds)
            except queue.Empty:
                yield None
                return
            if not line:
                return
            yield line


def _end_of(errors: IO[str]) -> str:
    errors.seek(0)
    return errors.read()[-_MOST_ERRORS:]
