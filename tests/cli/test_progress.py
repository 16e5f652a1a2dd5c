"""Progress: what is said of long work, in which form, and how it never ends the work."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest
import warm

from npuq.choices import PROGRESS_FORMS
from npuq.cli.terminal import progress as progress_module
from npuq.cli.terminal.pace import Pace
from npuq.cli.terminal.progress import TerminalProgress
from npuq.progress import Task
from npuq.units import format_duration


class Clock:
    """Seconds as a test has them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# ---- how far, how fast, how long -------------------------------------------------------------------------------------


def test_time_left_goes_by_effort_and_not_by_bytes() -> None:
    """Half of the bytes are done, but only a tenth of the work."""
    clock = Clock()
    pace = Pace(Task("convert", 1000, effort=10.0, layers=4), clock)
    clock.now += 20
    pace.advance(500, 1.0, 0, True)
    assert (pace.fraction, pace.rate, pace.seconds_left) == (0.1, 25.0, 180.0)
    assert pace.line(layer_done=True) == "layer 0 done (1 of 4), 500 B of 1 kB (10 %), 25 B/s, 3 min left"


def test_what_an_earlier_run_did_counts_as_done_and_not_as_speed() -> None:
    clock = Clock()
    pace = Pace(Task("convert", 1000, done=600, effort=100.0, effort_done=50.0, layers=8, layers_done=3), clock)
    assert (pace.fraction, pace.rate, pace.seconds_left) == (0.5, None, None)
    clock.now += 10
    pace.advance(100, 10.0, 3, True)
    assert (pace.rate, pace.seconds_left, pace.layers_done) == (10.0, 40.0, 4)


def test_time_left_follows_a_pace_that_changes() -> None:
    """A tenth as fast in the later half: what was before is forgotten."""
    clock = Clock()
    pace = Pace(Task("pull", 10_000), clock)
    for step in range(100):
        clock.now += 1
        pace.advance(100 if step < 50 else 10, None, None, False)
    assert pace.seconds_left == pytest.approx((10_000 - 5500) / 10, rel=0.05)


def test_work_that_stands_still_takes_longer_and_longer() -> None:
    clock = Clock()
    pace = Pace(Task("pull", 1000), clock)
    clock.now += 10
    pace.advance(500, None, None, False)
    left = pace.seconds_left
    clock.now += 90
    assert left is not None and pace.seconds_left == pytest.approx(10 * left)


def test_counts_that_are_not_bytes() -> None:
    clock = Clock()
    pace = Pace(Task("evaluate", 300, "contexts"), clock)
    clock.now += 8
    pace.advance(12, None, None, False)
    assert pace.line(layer_done=False) == "12 of 300 contexts (4 %), 1.5 contexts/s, 3 min left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3599, "1 h 0 min"), (19_200, "5 h 20 min"), (183_600, "2 d 3 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# ---- forms -----------------------------------------------------------------------------------------------------------

WORK = """
from npuq.cli.terminal.progress import TerminalProgress
from npuq.progress import Task
with TerminalProgress(FORM, QUIET) as progress:
    progress.note("beginning \\x1b[2J")
    progress.start(Task("work", 4000, layers=2))
    progress.advance(2000, layer=0, layer_done=True)
    progress.advance(1000, layer=1)
    progress.note("between")
    progress.advance(1000, layer=1, layer_done=True)
"""


def run_work(form: str, quiet: bool = False, size: tuple[int, int] | None = None) -> str:
    """What stderr gets, on a terminal of that size or without one."""
    code = WORK.replace("FORM", repr(form)).replace("QUIET", str(quiet))
    if size is None:
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
        ).stderr
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    subprocess.run([sys.executable, "-c", code], stderr=theirs, check=True, timeout=60)
    os.write(theirs, b"end")  # something to read when nothing was drawn
    drawn = ""
    while not drawn.endswith("end"):
        drawn += os.read(ours, 65536).decode()
    os.close(ours)
    os.close(theirs)
    return drawn


@pytest.mark.parametrize("form", ["auto", "bar"])
@pytest.mark.parametrize("size", [(0, 0), (24, 150)])
def test_a_bar_on_any_terminal(form: str, size: tuple[int, int]) -> None:
    drawn = run_work(form, size=size)
    assert "work: 100%|" in drawn and "layer 1, 4 kB of 4 kB (100 %)" in drawn and "between" in drawn


@pytest.mark.parametrize("form", ["auto", "lines"])
def test_lines_without_a_terminal(form: str) -> None:
    lines = run_work(form).splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        r"beginning \x1b[2J",
        "work: layer 0 done (1 of 2)",
        "between",
        "work: layer 1 done (2 of 2)",
    ]
    assert all(f" of 4 kB ({part} %)" in lines[line] for line, part in ((1, 50), (3, 100)))


def test_lines_on_a_terminal_that_asked_for_them() -> None:
    drawn = run_work("lines", size=(24, 80))
    assert "\r\n" in drawn and "|" not in drawn and "layer 1 done (2 of 2)" in drawn


def test_json_lines() -> None:
    events = [json.loads(line) for line in run_work("json").splitlines()]
    assert [event["event"] for event in events] == ["note", "layer", "note", "layer"]
    assert events[1].items() >= {"task": "work", "done": 2000, "total": 4000, "unit": "B", "layer": 0}.items()
    assert events[3].items() >= {"fraction": 1.0, "layers": 2, "layers_done": 2}.items()
    assert {"per_second", "seconds", "seconds_left"} <= events[1].keys()


@pytest.mark.parametrize("size", [None, (24, 80)])
def test_no_progress_still_has_notes_and_quiet_has_none(size: tuple[int, int] | None) -> None:
    end = [] if size is None else ["end"]
    assert run_work("none", size=size).splitlines() == [r"beginning \x1b[2J", "between", *end]
    for form in PROGRESS_FORMS:
        assert run_work(form, quiet=True, size=size).splitlines() == end


def test_a_line_every_30_seconds_even_where_nothing_happens(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert progress_module._LINE_SECONDS == 30
    monkeypatch.setattr(progress_module._Lines, "seconds", 0.05)
    with TerminalProgress(form="lines") as progress:
        progress.start(Task("work", 100, "steps"))
        progress.advance(50)
        threading.Event().wait(0.5)
    lines = capfd.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 12 and all(line.startswith("work: 50 of 100 steps (50 %)") for line in lines)


def test_nothing_is_left_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module._Lines, "seconds", 0.01)
    before = threading.active_count()
    with TerminalProgress(form="lines") as progress:
        for _ in range(5):
            progress.start(Task("work", 100))
    for _ in range(200):
        if threading.active_count() <= before:  # fewer where a thread of another test has ended meanwhile
            break
        threading.Event().wait(0.01)
    assert threading.active_count() <= before


def test_without_a_thread_of_its_own(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fails)
    with TerminalProgress(form="lines") as progress:
        progress.start(Task("work", 100, layers=1))
        progress.advance(100, layer=0, layer_done=True)
    assert "layer 0 done" in capfd.readouterr().err


# ---- every command, and streams that refuse --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convert", "verify", "evaluate", "push", "pull", "report"])
def test_every_long_command_has_the_option(name: str) -> None:
    done = warm.run(name, "--help")
    assert "--progress [auto|bar|lines|json|none]" in done.stdout and "--quiet" in done.stdout


def convert(source: Path, output: Path, *options: str, **streams: object) -> subprocess.CompletedProcess[str]:
    return warm.run("convert", str(source), str(output), "--method", "minmax", *options, **streams)


def whole(output: Path) -> bool:
    return (output / "npuq" / "manifest.json").exists() and not (output / "npuq" / "progress.jsonl").exists()


def test_a_line_for_each_layer_of_a_conversion(example_fp8: Path, tmp_path: Path) -> None:
    done = convert(example_fp8, tmp_path / "out", capture_output=True)
    layers = [line for line in done.stderr.splitlines() if line.startswith("convert: layer ")]
    assert sorted(line.split()[2] for line in layers) == ["0", "1", "2", "3", "4"]
    assert " (100 %)" in layers[-1] and "B/s" in layers[-1]


@pytest.mark.parametrize("form", ["bar", "lines", "json"])
@pytest.mark.parametrize("broken", ["full", "closed", "gone"])
def test_stderr_that_refuses_does_not_end_the_work(form: str, broken: str, example_fp8: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if broken == "full":
        with Path("/dev/full").open("w") as full:
            done = convert(example_fp8, out, "--progress", form, stdout=subprocess.PIPE, stderr=full)
    elif broken == "closed":
        done = warm.shell(f'npuq convert "{example_fp8}" "{out}" --method minmax --progress {form} 2>&-')
    else:
        reader, writer = os.pipe()
        os.close(reader)
        done = convert(example_fp8, out, "--progress", form, stdout=subprocess.PIPE, stderr=writer)
        os.close(writer)
    assert done.returncode == 0 and "269 weights" in done.stdout and whole(out)


@pytest.mark.parametrize("broken", ["full", "closed", "gone"])
def test_stdout_that_refuses_is_no_failure_of_the_work(broken: str, example_fp8: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if broken == "full":
        with Path("/dev/full").open("w") as full:
            done = convert(example_fp8, out, "--quiet", stdout=full, stderr=subprocess.PIPE)
    elif broken == "closed":
        done = warm.shell(f'npuq convert "{example_fp8}" "{out}" --method minmax --quiet >&-')
    else:
        reader, writer = os.pipe()
        os.close(reader)
        done = convert(example_fp8, out, "--quiet", stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
    assert done.returncode == 0 and whole(out)
    told = "" if broken == "closed" else "npuq: the work is done, but stdout takes no more: "
    assert done.stderr.startswith(told) and done.stderr.count("\n") == bool(told)


def test_closed_streams_leave_their_numbers_to_no_file(example_fp8: Path, tmp_path: Path) -> None:
    """Somebody who writes to number 2, as libraries do, must not write into the artifact."""
    code = (
        "import os, sys; from npuq.cli.main import main; sys.argv = ['npuq', 'inspect', sys.argv[1]]; main(); "
        "os.write(2, b'warning'); os._exit(10 + os.open(sys.argv[2], os.O_RDONLY))"
    )
    command = f'exec "{sys.executable}" -c "{code}" "{example_fp8}" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", command], timeout=60).returncode > 12


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "ascii", "cp437"])
def test_terminals_whose_encoding_lacks_characters(encoding: str, example_fp8: Path, tmp_path: Path) -> None:
    """The table has an arrow, the name of the output is in Chinese and Arabic, and one byte of it in nothing."""
    output = Path(os.fsdecode(os.fsencode(tmp_path / "模型-نموذج") + b"\xff"))
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    for options in ((), ("--dry-run",), ("--json",)):
        lines = ("--method", "minmax", "--progress", "lines")
        done = warm.run("convert", str(example_fp8), str(output), *lines, *options, text=False, env=environment)
        assert done.returncode == 0 and b"Traceback" not in done.stderr
        if "--json" in options:
            assert json.loads(done.stdout.decode(encoding))["output"] == str(output)
    assert whole(output)
    refused = warm.run("verify", str(output) + "ö", text=False, env=environment)
    assert refused.returncode == 1 and refused.stderr.startswith(b"npuq: error: ") and refused.stderr.count(b"\n") == 1
