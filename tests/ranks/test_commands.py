"""Commands under torchrun: one voice, and one end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kill_campaign
import pytest
from kill_campaign import Kill

from npuq.cli.ranks import waiting_note
from npuq.inputs.launch import Launch

ROOT = Path(__file__).parents[2]
OPTIONS = ["--prompt", "The law", "--prompt", "A", "--max-new-tokens", "12", "--seed", "3"]


def npuq(ranks: int, *arguments: object, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run npuq on that many ranks; of 1, without torchrun."""
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--nproc-per-node", str(ranks), "-m"]
    return subprocess.run(
        [sys.executable, "-m", *launcher, "npuq", *map(str, arguments)],
        input=text,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)},
    )


def own_lines(text: str) -> list[str]:
    """Lines of npuq's own among those of torchrun."""
    return [line for line in text.splitlines() if line.startswith(("npuq:", "Usage:", "Error:"))]


def rank(
    number: object, *arguments: object, size: object = 2, local: object = None
) -> subprocess.CompletedProcess[str]:
    """Run npuq as one rank of a launch whose others do not come. local: its number on its machine."""
    place = number if local is None else local
    variables = {"RANK": number, "WORLD_SIZE": size, "LOCAL_RANK": place, "MASTER_ADDR": "localhost"}
    return subprocess.run(
        [sys.executable, "-m", "npuq", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            **{name: str(value) for name, value in variables.items()},
            "MASTER_PORT": "1",
            "PYTHONPATH": str(ROOT.parent),
        },
    )


def test_generate_prints_what_one_process_prints(example_fp8: Path) -> None:
    """Rank 0 alone reads standard input."""
    arguments = ["generate", example_fp8, *OPTIONS, "--prompt-file", "-"]
    alone, several = (npuq(ranks, *arguments, text="The section\n") for ranks in (1, 2))
    assert (several.returncode, several.stdout) == (0, alone.stdout)
    notes = [[line for line in each.stderr.splitlines() if line.startswith("sampling:")] for each in (alone, several)]
    assert notes[0] == notes[1]
    assert len(notes[0]) == 1


def test_evaluate_measures_what_one_process_measures(artifact: Path, example_fp8: Path, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The law of the United States, and the sections of it.\n" * 20, encoding="utf-8")
    options = ["--text", text, "--source", example_fp8, "--json", "--quiet", "--context", "64"]
    alone, several = (npuq(ranks, "evaluate", artifact, *options) for ranks in (1, 2))
    assert several.returncode == 0, several.stderr
    assert several.stdout == alone.stdout


def test_a_number_that_does_not_divide_is_refused_with_those_that_do(example_fp8: Path) -> None:
    ended = npuq(3, "generate", example_fp8, "--prompt", "A", "--parallel", "ep=3")
    assert ended.returncode == 1
    (line,) = own_lines(ended.stderr)
    assert "ep=3: 16 routed experts are not divisible by 3 ranks; take ep=1, or one of" in line


@pytest.mark.parametrize("number", [0, 1])
def test_commands_of_one_process_refuse_ranks(example_fp8: Path, number: int) -> None:
    ended = rank(number, "verify", example_fp8)
    assert ended.returncode == 1
    assert ended.stdout == ""
    said = ["npuq: error: npuq verify runs in one process: start it without torchrun, or unset RANK and WORLD_SIZE"]
    assert ended.stderr.splitlines() == ([] if number else said)


def test_the_first_rank_of_another_machine_tells_what_it_cannot_tell_rank_0(tmp_path: Path) -> None:
    ended = rank(1, "evaluate", "m", "--text", tmp_path / "missing", local=0)
    assert ended.returncode == 2
    assert "missing" in ended.stderr


@pytest.mark.parametrize(("number", "seconds", "said"), [(0, 0.01, True), (1, 0.01, False), (0, 60.0, False)])
def test_rank_0_says_for_whom_it_waits(
    number: int, seconds: float, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting_note(Launch(number, 4, number, 4, "node-0", 29500), seconds):
        time.sleep(0.3)
    found = capsys.readouterr().err
    assert found.startswith("waiting for 3 more ranks at node-0:29500 (WORLD_SIZE=4)") == said
    assert bool(found) == said


@pytest.mark.parametrize(("number", "size"), [("x", 2), (2, 2), (0, "many")])
def test_variables_of_torchrun_are_checked(number: object, size: object) -> None:
    ended = rank(number, "generate", "m", "--prompt", "A", size=size)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert line.startswith("npuq: error: the variable ")


def test_ranks_need_torchrun(example_fp8: Path) -> None:
    ended = npuq(1, "generate", example_fp8, "--prompt", "A", "--parallel", "ep=2")
    assert ended.returncode == 2
    assert "start them with torchrun" in ended.stderr


KILLS = [
    Kill(2, 1, signal.SIGKILL, 0.3, early=False),
    Kill(4, 0, signal.SIGKILL, 0.3, early=False),
    Kill(2, 1, signal.SIGTERM, 0.5, early=False),
]


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_killed_rank_ends_all_with_one_line(kill: Kill, tmp_path: Path) -> None:
    end = kill_campaign.run(kill, tmp_path)
    assert end.fault(kill.early) is None, end.stderr


def test_an_interruption_is_one_line(tmp_path: Path) -> None:
    """Ctrl-C of a terminal goes to torchrun and to every rank."""
    stderr = tmp_path / "stderr"
    launcher = kill_campaign.start(2, stderr)
    pids = kill_campaign.pids_of_ranks(launcher, 2)
    kill_campaign.wait_for_steps(stderr, launcher)
    time.sleep(0.5)
    os.killpg(launcher.pid, signal.SIGINT)
    end = kill_campaign.wait_for_end(launcher, pids, stderr, 30)
    assert end.fault() is None, end.stderr
    assert end.lines == ["npuq: error: interrupted"]


def test_an_error_of_rank_0_ends_all(example_fp8: Path) -> None:
    ended = npuq(2, "generate", example_fp8, "--prompt", "A " * 5000)
    assert ended.returncode == 1
    (line,) = own_lines(ended.stderr)
    assert "tokens and the context is" in line
