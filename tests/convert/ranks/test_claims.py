"""Claims: one process at a time has a shard, whatever happened to the one before, and whatever lies in the folder."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from plans import plan_of

from npuq.convert.calibrate.ranks.staging import Staging
from npuq.convert.calibrate.states import FOLDER, remove_states
from npuq.convert.ranks import holder as holders
from npuq.convert.ranks.claims import Claims
from npuq.convert.ranks.holder import Holder
from npuq.convert.ranks.liveness import Pulse, Watch
from npuq.convert.ranks.run import Run, done_so_far, remove_runs
from npuq.convert.ranks.share import Share
from npuq.convert.write.journal import JobEntry, Journal
from npuq.errors import ConversionError
from npuq.formats.schemes import Scheme
from npuq.progress import Silent
from npuq.quant.weight_error import ErrorSums

IDENTITY = {"recipe": "w4a8"}
PULSE = Pulse(beat=0.05, silent=0.5)
ENTRY = JobEntry(ErrorSums(0.25, 1.0), bytes(16), bytes(16))
RUN = "0-of-2-0123456789abcdef.jsonl"


@pytest.fixture(scope="module")
def plan():
    return plan_of([(f"layers.{number}.down_proj.weight", (40, 16), Scheme.W8A8) for number in range(8)], 3000)


def begin(output: Path, rank: int = 0, size: int = 1) -> Run:
    return Run.begin(output, IDENTITY, Share(rank, size), PULSE)


def write_run(output: Path, process: dict[str, object] | None) -> Path:
    """A run that another process left, with a claim on shard 0 and a job in it."""
    begin(output).__exit__()
    path = output / "npuq" / "ranks" / RUN
    path.write_bytes(Journal.first_line(IDENTITY, process))
    journal = Journal.open(path)
    journal.append({0: ENTRY}, {})
    journal.settle([], [0])
    journal.close()
    (path.parent / "claims" / "0.1").symlink_to(RUN)
    return path


def process_of(pid: int, machine: str | None = None) -> dict[str, object]:
    found = Holder.here(Share(0, 2))
    return {**found.as_json(), "pid": pid, "machine": found.machine if machine is None else machine}


def dead() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_all_shards_once_and_alike(size, plan):
    shares = [Share(rank, size).shards(plan) for rank in range(size)]
    assert sorted(number for share in shares for number in share) == list(range(len(plan.shards)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("text", ["4/4", "1", "-1/2", "1/2/3", "0/0", "0/99999", "٣/4", "1/2\n"])
def test_what_is_no_share(text):
    with pytest.raises(ConversionError, match="--shard-of"):
        Share.parse(text)


def test_of_two_runs_one_has_a_shard(tmp_path, plan):
    with begin(tmp_path, 0, 2) as first, begin(tmp_path, 1, 2) as second:
        first.take_now([0, 1], plan)
        with pytest.raises(ConversionError, match=r"model-00002.* is being made by rank 0 of 2 \(process"):
            second.take_now([1], plan)
        second.take_now([2], plan)
        first.end()
        second.take_now([1], plan)


def test_a_dead_process_of_this_machine_is_followed_at_once(tmp_path, plan):
    write_run(tmp_path, process_of(dead()))
    with begin(tmp_path) as run:
        run.take_now([0], plan)
        assert run.read_earlier(plan).jobs == {0: ENTRY}


def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path):
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    try:
        assert holders._started(child) is None
    finally:
        os.waitpid(child, 0)


def test_a_number_that_another_process_has_by_now_is_not_its(tmp_path):
    found = Holder.from_json({**process_of(os.getpid()), "started": 1})
    assert found.lives() is False
    assert Holder.here(Share()).lives() is True


def test_a_process_elsewhere_counts_as_dead_after_silence_alone(tmp_path, plan):
    """By the times of files alone, after it was also seen to be silent."""
    path = write_run(tmp_path, process_of(1, "elsewhere"))
    notes = Silent()
    with begin(tmp_path) as run:
        os.utime(path, (time.time() - 1000, time.time() - 1000))
        with pytest.raises(ConversionError, match="last sign of life is 1000 s old"):
            run.take_now([0], plan)  # long silent by its times, but not watched yet
        began = time.monotonic()
        run.take([0], plan, notes)
        assert time.monotonic() - began >= 2 * PULSE.beat
        assert run.read_earlier(plan).jobs == {0: ENTRY}


def test_a_process_elsewhere_that_beats_lives_whatever_its_clock(tmp_path, plan):
    path = write_run(tmp_path, process_of(1, "elsewhere"))
    with begin(tmp_path) as run:
        for hour in range(8):
            os.utime(path, (hour * 3600, hour * 3600))  # an odd clock, but it moves
            with pytest.raises(ConversionError, match="is being made by"):
                run.take_now([0], plan)
            time.sleep(PULSE.beat)


def test_a_run_that_lost_its_shards_writes_no_more(tmp_path, plan):
    with begin(tmp_path) as run:
        run.take_now([0], plan)
        (tmp_path / "npuq" / "ranks" / "claims" / "0.2").symlink_to(RUN)
        deadline = time.monotonic() + 60
        with pytest.raises(ConversionError, match="another took over its shards"):
            while time.monotonic() < deadline:
                run.journal.append({0: ENTRY}, {})
                time.sleep(PULSE.beat)


def test_the_last_journal_that_speaks_for_a_shard_is_heard(tmp_path, plan):
    """Not one that claimed it and was killed before it had taken over what was done."""
    write_run(tmp_path, process_of(dead()))
    later = begin(tmp_path)
    later.take_now([0, 1], plan)
    later.end()
    later.journal.close()
    assert done_so_far(tmp_path, IDENTITY, plan).jobs == {0: ENTRY}
    with begin(tmp_path) as run:
        run.take_now([0], plan)
        run.read_earlier(plan)
        run.journal.settle([], [0])
        del run.journal.record.jobs[0]
        run.journal.settle([])
    assert done_so_far(tmp_path, IDENTITY, plan).jobs == {}


def test_what_lies_in_the_folders(tmp_path, plan):
    """Claims and journals from a stranger: of no run, of another's file, of a pipe, of a link out, damaged."""
    write_run(tmp_path, process_of(dead()))
    ranks = tmp_path / "npuq" / "ranks"
    claims = ranks / "claims"
    for name, target in {
        "0.999999999": RUN,
        "1.1": "../../../etc/passwd",
        "1.2": "/dev/stdin",
        "2.1": "x\x1b[2J",
        "2": RUN,
    }.items():
        (claims / name).symlink_to(target)
    (claims / "3.4").write_text("0")
    (claims / "4.1").mkdir()
    names = {5: "1-of-2-aaaaaaaaaaaaaaaa.jsonl", 6: "1-of-2-bbbbbbbbbbbbbbbb.jsonl", 7: "1-of-2-cccccccccccccccc.jsonl"}
    for shard, name in names.items():
        (claims / f"{shard}.1").symlink_to(name)
    os.mkfifo(ranks / names[5])
    (ranks / names[6]).symlink_to("/dev/zero")
    (ranks / names[7]).write_bytes(Journal.first_line(IDENTITY, {"pid": -1, "host": ["x"]}) + b"\xff\n")
    os.utime(ranks / names[7], (1, 1))
    with begin(tmp_path) as run:
        run.take(range(len(plan.shards)), plan, Silent())
        assert run.read_earlier(plan).jobs == {0: ENTRY}
        assert (claims / "3.5").is_symlink() and (claims / "0.2").is_symlink()
    remove_runs(tmp_path)
    assert sorted(path.name for path in claims.iterdir()) == ["0.999999999", "2", "4.1"]  # nothing that we make


def test_folders_that_are_links_are_left_alone(tmp_path, plan):
    begin(tmp_path / "out").__exit__()
    foreign, claims = tmp_path / "foreign", tmp_path / "out" / "npuq" / "ranks" / "claims"
    (foreign / "staged-1").mkdir(parents=True)
    kept = [foreign / "1.2", foreign / "weights.bin", foreign / "staged-1" / "model.safetensors"]
    for path in kept:
        path.write_text("another program's")
    claims.rmdir()
    claims.symlink_to(foreign)
    (tmp_path / "out" / "npuq" / FOLDER).symlink_to(foreign)
    for remove in (
        lambda: remove_runs(tmp_path / "out"),
        lambda: remove_states(tmp_path / "out" / "npuq"),
        lambda: Staging(tmp_path / "out" / "npuq" / FOLDER, plan).files(1),
    ):
        with pytest.raises(OSError, match="is a link"):
            remove()
    assert all(path.exists() for path in kept)


def test_a_claim_that_an_old_listing_lacks(tmp_path):
    claims = Claims(tmp_path)
    for number in (1, 2, 3):
        assert claims.take(0, number, RUN)
    assert not claims.take(0, 3, RUN)
    assert claims.newest(0, {1: RUN}) == (3, RUN)
    with pytest.raises(ConversionError, match="was claimed 9999 times"):
        claims.take(0, 10_000, RUN)


def test_a_run_without_a_journal_is_over(tmp_path):
    watch = Watch(tmp_path, lambda: 0, PULSE)
    assert watch.state(RUN).over and watch.state("../x").over and watch.state(None).over
