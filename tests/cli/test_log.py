"""The log of a command, and colours on a terminal."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import warm
from terminal_process import TerminalProcess

from npuq.cli.terminal.color import colored, wants_color
from npuq.cli.terminal.log import log, without_secrets
from npuq.cli.terminal.progress import TerminalProgress
from npuq.progress import Task

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-deepseek-v3-fp8"
TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d "


def test_a_log_has_the_command_its_results_and_its_end(tmp_path: Path) -> None:
    for arguments in (("inspect", str(EXAMPLE)), ("inspect", "nope"), ("inspect", "x", "--nope")):
        warm.run("--log-file", str(tmp_path / "log"), *arguments)
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(re.match(TIME, line) for line in lines)
    told = [re.sub(TIME, "", line) for line in lines]
    assert re.fullmatch(rf"npuq \S+: npuq --log-file \S+ inspect {EXAMPLE}", told[0])
    assert told[1].startswith("checkpoint: deepseek_v3") and "routed_expert" in "".join(told)
    ends = [line for line in told if line.startswith("exit status")]
    assert [line.split()[2] for line in ends] == ["0", "1", "2"]
    assert "npuq: error: nope: no such directory" in told and any("--nope" in line for line in told)


def test_a_log_that_cannot_be_opened_is_wrong_usage(tmp_path: Path) -> None:
    done = warm.run("--log-file", str(tmp_path / "no" / "log"), "inspect", "x")
    assert done.returncode == 2 and "log: No such file or directory" in done.stderr
    done = warm.shell(f"mkfifo {tmp_path}/fifo; npuq --log-file {tmp_path}/fifo inspect x")
    assert done.returncode == 2 and "fifo: No such device or address" in done.stderr


def test_a_log_that_refuses_ends_no_work() -> None:
    done = warm.run("--log-file", "/dev/full", "inspect", str(EXAMPLE))
    assert done.returncode == 0 and "MB in all" in done.stdout and done.stderr == ""


def test_tokens_are_no_part_of_a_log() -> None:
    assert without_secrets(["push", "a", "--token", "hf_x", "--tag", "v1"]) == [
        "push",
        "a",
        "--token",
        "***",
        "--tag",
        "v1",
    ]
    assert without_secrets(["push", "a", "--token=hf_x"]) == ["push", "a", "--token=***"]


def test_a_log_has_progress_and_notes_that_the_terminal_does_not_get(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log.open(tmp_path / "log", "rank 1: ")
    try:
        with TerminalProgress(quiet=True) as display:
            display.start(Task("verify", 200, layers=2))
            time.sleep(0.01)
            display.advance(100, layer=0, layer_done=True)
            display.note("one\x1b[2J")
    finally:
        log.close()
    assert capsys.readouterr().err == ""
    told = [re.sub(f"{TIME}rank 1: ", "", line) for line in (tmp_path / "log").read_text().splitlines()]
    assert re.fullmatch(r"verify: layer 0 done \(1 of 2\), 100 B of 200 B \(50 %\), \S+ \S?B/s, \d s left", told[0])
    assert told[1:] == ["one\\x1b[2J"]


@pytest.mark.parametrize(
    ("variable", "value", "color"), [("X", "1", True), ("NO_COLOR", "1", False), ("TERM", "dumb", False)]
)
def test_an_error_is_red_on_a_terminal_that_wants_it(variable: str, value: str, color: bool) -> None:
    process = TerminalProcess("inspect", "nope", environment={"NO_COLOR": "", variable: value})
    assert process.wait() == 1
    error = "\x1b[1;31mnpuq: error:\x1b[0m" if color else "npuq: error:"
    assert process.shown == f"{error} nope: no such directory\n"


def test_only_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __init__(self, terminal: bool):
            self.isatty = lambda: terminal

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_color(Stream(True)) and not wants_color(Stream(False)) and not wants_color(None)
    assert colored("problem: x", Stream(True)) == "\x1b[1;31mproblem:\x1b[0m x"
    assert colored("problem: x", Stream(False)) == "problem: x"
    assert colored("a problem: x", Stream(True)) == "a problem: x"
