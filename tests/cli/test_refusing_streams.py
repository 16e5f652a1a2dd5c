"""Streams that are closed, full or without a reader: the right exit status, a line if it can be had, no traceback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import warm

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-deepseek-v3-fp8"
GENERATE = f"generate {EXAMPLE} --prompt a --max-new-tokens 2"


def shell(line: str) -> tuple[int, str, str]:
    """(exit status of npuq, stdout, stderr) of a line in bash, in which `npuq` is the command."""
    done = warm.shell(line)
    return done.returncode, done.stdout, done.stderr


def started(line: str) -> tuple[int, str, str]:
    """The same, with a process that starts with these streams."""
    script = f'npuq() {{ "{sys.executable}" -m npuq "$@"; }}\n{line}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    "command",
    ["--version", "--help", f"inspect {EXAMPLE}", f"inspect {EXAMPLE} --json", GENERATE, f"{GENERATE} --json"],
)
def test_a_full_disk_is_a_line(command: str) -> None:
    status, _, err = shell(f"npuq {command} >/dev/full")
    assert status == 1
    last = err.splitlines()[-1]
    assert last.startswith("npuq: error: ") and last.endswith("No space left on device")
    assert "Traceback" not in err and "Exception ignored" not in err


@pytest.mark.parametrize("option", ["", "--json"])
def test_an_error_whose_document_does_not_fit(option: str) -> None:
    status, _, err = shell(f"npuq inspect no/such/directory {option} >/dev/full")
    assert (status, err.count("\n")) == (1, 1)
    assert err.startswith("npuq: error: no/such")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (f"inspect {EXAMPLE}", 0),
        (GENERATE, 0),
        ("inspect no/such/directory", 1),
        ("inspect no/such/directory --json", 1),
        ("inspect --no-such-option", 2),
        ("--traceback inspect no/such/directory", 1),
    ],
)
@pytest.mark.parametrize("to", ["/dev/full", "&-"])
def test_errors_that_cannot_be_told_change_nothing(command: str, status: int, to: str) -> None:
    assert shell(f"npuq {command} 2>{to}")[0] == status


@pytest.mark.parametrize(
    ("run", "closed"),
    [(shell, ">&-"), (shell, "<&-"), (started, "2>&-"), (started, "<&- >&- 2>&-")],
)
def test_closed_streams(run: Callable[[str], tuple[int, str, str]], closed: str) -> None:
    status, out, err = run(f"npuq {GENERATE} {closed}")
    assert status == 0 and "internal error" not in err
    assert bool(out) is (">&-" not in closed.replace("2>&-", ""))


def test_a_prompt_from_a_closed_stdin_is_empty() -> None:
    status, _, err = shell(f"npuq generate {EXAMPLE} --prompt-file - <&-")
    assert status == 1 and "the prompt is empty" in err


def test_a_prompt_that_is_no_text() -> None:
    status, _, err = shell(f"printf '\\377' | npuq generate {EXAMPLE} --prompt-file -")
    assert status == 2 and "-: is not UTF-8 text (byte 0)" in err


def test_a_reader_that_has_gone_is_no_news() -> None:
    status, _, err = shell(f"npuq generate {EXAMPLE} --prompt a --quiet | true")
    assert (status, err) == (1, "")
