"""Killed at any moment and started again, a conversion continues and ends byte-identical."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from npuq.convert.plan.prepare import prepare

OPTIONS = {"method": "minmax", "max_shard_size": 60_000, "workers": 2}
JOBS = 99


@pytest.fixture(scope="module")
def undisturbed(rig, v3_source, tmp_path_factory, tree):
    """The files of a conversion that nothing disturbed, and how many calls changed the disk on the way."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    answer = rig(v3_source, output, options=OPTIONS)
    assert answer["summary"]["status"] == "converted" and not answer["killed"]
    return tree(output), answer["calls"]


def planned_jobs(source: Path) -> list[dict[str, Any]]:
    """Source tensor and number of output tensors of each job, in the plan's order."""
    prepared = prepare(source, "w4a8", "minmax", 60_000)
    prepared.checkpoint.close()
    return [{"source": job.source, "outputs": len(job.outputs)} for job in prepared.plan.jobs]


def looks_finished(output: Path) -> bool:
    return (output / "npuq" / "manifest.json").exists()


@pytest.mark.parametrize("seed", range(30))
def test_sigkill_at_any_call_that_changes_the_disk(seed, rig, v3_source, undisturbed, tmp_path, tree):
    """Two kills in a row, at random places of the whole run, then an undisturbed one."""
    expected, calls = undisturbed
    draw = random.Random(seed)
    output = tmp_path / "out"
    for _ in range(2):
        answer = rig(v3_source, output, options=OPTIONS, kill_at=draw.randint(1, calls))
        if not answer["killed"]:
            break  # a continued run has fewer calls: it came to its end
        assert not looks_finished(output) or tree(output).items() >= expected.items()
    answer = rig(v3_source, output, options=OPTIONS | {"workers": draw.choice([1, 3])})
    assert answer["summary"]["status"] in ("converted", "finished")
    assert tree(output) == expected


def test_sigkill_throughout_the_finish(rig, v3_source, undisturbed, tmp_path, tree):
    """The finish is the last calls of a run; none of its jobs is done twice."""
    expected, calls = undisturbed
    before_finish = tmp_path / "before"
    # Small files are renamed into place: the first rename after the journal's own begins the finish.
    assert rig(v3_source, before_finish, options=OPTIONS, kill_at=2, calls=["replace", "rename"])["killed"]
    probe = tmp_path / "probe"
    shutil.copytree(before_finish, probe)
    answer = rig(v3_source, probe, options=OPTIONS)
    assert answer["summary"]["jobs_resumed"] == JOBS
    finish_calls = answer["calls"]
    assert 20 < finish_calls < calls
    # A file takes three calls (sync, rename, sync of the folder): every fourth call meets each of them in turn.
    for number in sorted({*range(1, finish_calls + 1, 4), *range(finish_calls - 7, finish_calls + 1)}):
        output = tmp_path / str(number)
        shutil.copytree(before_finish, output)
        assert rig(v3_source, output, options=OPTIONS, kill_at=number)["killed"]
        if looks_finished(output):
            assert tree(output).items() >= expected.items()
        summary = rig(v3_source, output, options=OPTIONS)["summary"]
        assert summary["jobs_resumed"] == JOBS
        assert tree(output) == expected
        shutil.rmtree(output)


@pytest.mark.parametrize("seed", range(4))
def test_sigkill_from_outside_at_a_random_moment(seed, rig, v3_source, undisturbed, tmp_path, tree):
    expected, _ = undisturbed
    output = tmp_path / "out"
    for _ in range(3):
        rig(v3_source, output, options=OPTIONS, kill_after=random.Random(seed).uniform(0.005, 0.12))
    assert rig(v3_source, output, options=OPTIONS)["summary"]["status"] in ("converted", "finished")
    assert tree(output) == expected


def test_work_in_the_journal_is_not_done_again(rig, v3_source, undisturbed, tmp_path, tree):
    """A continued run writes the slots of the jobs that were left, and no other."""
    expected, _ = undisturbed
    per_job = {job["source"]: job["outputs"] for job in planned_jobs(v3_source)}
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS | {"workers": 1}, kill_at=100, slow=0.01, calls=["pwrite"])["killed"]
    lines = (output / "npuq" / "progress.jsonl").read_text().splitlines()
    done = [job for line in lines[1:] for job in json.loads(line).get("jobs", [])]
    assert 0 < len(done) < JOBS
    answer = rig(v3_source, output, options=OPTIONS, calls=["pwrite"])
    assert answer["summary"]["jobs_resumed"] == len(done)
    left = [outputs for index, outputs in enumerate(per_job.values()) if index not in {entry[0] for entry in done}]
    headers = answer["calls"] - sum(left)  # a shard's header is written once more when it is opened
    assert 0 < headers <= len(list(output.glob("*.safetensors")))
    assert tree(output) == expected


def test_a_torn_journal_line_is_done_again(rig, v3_source, undisturbed, tmp_path, tree):
    expected, _ = undisturbed
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, kill_at=2, calls=["replace", "rename"])["killed"]
    journal = output / "npuq" / "progress.jsonl"
    content = journal.read_bytes()
    journal.write_bytes(content[: len(content) * 2 // 3])
    answer = rig(v3_source, output, options=OPTIONS)
    assert 0 < answer["summary"]["jobs_resumed"] < JOBS
    assert tree(output) == expected


@pytest.mark.parametrize("damage", ["missing", "short", "other header"])
def test_shards_lost_since_the_interruption_are_made_again(damage, rig, v3_source, undisturbed, tmp_path, tree):
    expected, _ = undisturbed
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, kill_at=2, calls=["replace", "rename"])["killed"]
    shard = sorted(output.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "short":
        shard.write_bytes(shard.read_bytes()[:-1])
    else:
        shard.write_bytes(b"x" + shard.read_bytes()[1:])
    answer = rig(v3_source, output, options=OPTIONS)
    assert 0 < answer["summary"]["jobs_resumed"] < JOBS
    assert tree(output) == expected


@pytest.mark.parametrize("seed", range(4))
def test_a_kill_while_lost_shards_are_made_again(seed, rig, v3_source, undisturbed, tmp_path, tree):
    """The new file of a lost shard has its header and size at once: the journal must not vouch for its slots."""
    expected, _ = undisturbed
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, kill_at=2, calls=["replace", "rename"])["killed"]
    for shard in sorted(output.glob("*.safetensors"))[1:4]:
        shard.unlink()
    kill_at = random.Random(seed).randint(2, 30)
    assert rig(v3_source, output, options=OPTIONS, kill_at=kill_at, calls=["pwrite", "ftruncate"])["killed"]
    assert rig(v3_source, output, options=OPTIONS)["summary"]["jobs_resumed"] < JOBS
    assert tree(output) == expected


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_catchable_signals_end_cleanly_and_keep_what_is_done(
    number, status, rig, v3_source, undisturbed, tmp_path, tree
):
    expected, calls = undisturbed
    output = tmp_path / "out"
    answer = rig(v3_source, output, options=OPTIONS, signal_at=[calls // 3, int(number)])
    assert answer["exit_code"] == status
    assert number.name in answer["error"] and "run the same command to continue" in answer["error"]
    assert not looks_finished(output)
    answer = rig(v3_source, output, options=OPTIONS)
    assert answer["summary"]["jobs_resumed"] > 0
    assert tree(output) == expected
