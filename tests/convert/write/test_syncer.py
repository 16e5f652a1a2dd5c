"""What the thread behind the workers tells the disk, and when."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path

import pytest
from plans import plan_of

from npuq.convert.plan.plan import Job, Plan
from npuq.convert.write import shards, syncer
from npuq.convert.write.journal import JobEntry
from npuq.convert.write.shards import ShardFiles
from npuq.convert.write.syncer import Syncer
from npuq.formats.schemes import Scheme
from npuq.quant.weight_error import ErrorSums

HOUR = 3600.0
ENTRY = JobEntry(ErrorSums(0.0, 0.0), b"", b"")


@pytest.fixture
def plan() -> Plan:
    return plan_of([(f"layers.{i}.gate_proj.weight", (64, 64), Scheme.W4A8) for i in range(12)], 1 << 14)


class _Journal:
    """Keeps what is appended, and can be waited for."""

    def __init__(self, directory: Path):
        self.path = directory / "npuq" / "journal"
        self.jobs: list[int] = []
        self.appended = threading.Event()

    def append(self, jobs: dict[int, JobEntry], hashes: dict[int, str]) -> None:
        self.jobs += jobs
        self.appended.set()


def _write(files: ShardFiles, job: Job) -> None:
    for slot in job.outputs:
        files.write(slot.shard, slot.start, memoryview(bytes(slot.nbytes)))


def _wait(condition: Callable[[], bool]) -> bool:
    done = threading.Event()
    return any(condition() or done.wait(0.01) for _ in range(500)) and condition()


def test_write_back_begins_with_the_workers(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long before a sync is due the kernel is told of every byte that finished jobs have written."""
    told: list[tuple[int, int, int]] = []

    class Files(ShardFiles):
        def begin_writeback(self, shard: int, start: int, end: int) -> None:
            told.append((shard, start, end))

    monkeypatch.setattr(syncer, "_WRITEBACK_BYTES", 2 * plan.jobs[0].output_bytes)
    files, journal = Files(tmp_path, plan), _Journal(tmp_path)
    behind = Syncer(plan, files, journal, HOUR, 1 << 40)
    behind.start()
    for job in plan.jobs:
        _write(files, job)
        behind.job_done(job.index, ENTRY)
        assert _wait(lambda: behind._fresh_bytes < syncer._WRITEBACK_BYTES)
    assert len(plan.jobs) % 2 == 0
    for job in plan.jobs:
        for slot in job.outputs:
            assert _wait(
                lambda slot=slot: any(
                    shard == slot.shard and start <= slot.start and slot.start + slot.nbytes <= end
                    for shard, start, end in told
                )
            ), slot
    assert journal.jobs == []
    behind.finish()
    assert journal.jobs == [job.index for job in plan.jobs]
    files.close()


def test_jobs_are_journaled_when_enough_is_written(tmp_path: Path, plan: Plan) -> None:
    files, journal = ShardFiles(tmp_path, plan), _Journal(tmp_path)
    behind = Syncer(plan, files, journal, HOUR, 3 * plan.jobs[0].output_bytes)
    behind.start()
    for job in plan.jobs[:3]:
        _write(files, job)
        behind.job_done(job.index, ENTRY)
    assert journal.appended.wait(10)
    assert journal.jobs == [0, 1, 2]
    behind.finish()
    files.close()


def test_a_slow_disk_rests_between_syncs(tmp_path: Path, plan: Plan) -> None:
    """Every job is enough for a sync, but each is followed by a rest that lasts as long."""
    spans: list[tuple[float, float]] = []

    class Files(ShardFiles):
        def sync(self, shards: Iterable[int]) -> None:
            started = time.monotonic()
            time.sleep(0.05)  # instead of a real one, which may take any time
            spans.append((started, time.monotonic()))

    files, journal = Files(tmp_path, plan), _Journal(tmp_path)
    behind = Syncer(plan, files, journal, HOUR, 1)
    behind.start()
    _write(files, plan.jobs[0])

    def another() -> bool:
        behind.job_done(0, ENTRY)
        return len(spans) >= 3

    assert _wait(another)
    behind.finish()
    assert all(later - end >= end - started for (started, end), (later, _) in pairwise(spans[:3]))
    files.close()


def test_jobs_are_journaled_when_it_is_time(tmp_path: Path, plan: Plan) -> None:
    files, journal = ShardFiles(tmp_path, plan), _Journal(tmp_path)
    behind = Syncer(plan, files, journal, 0.05, 1 << 40)
    behind.start()
    _write(files, plan.jobs[0])
    behind.job_done(0, ENTRY)
    assert journal.appended.wait(10)
    behind.finish()
    files.close()


def test_only_open_files_are_written_back(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    monkeypatch.setattr(shards, "_SYNC_FILE_RANGE", lambda *arguments: calls.append(arguments))
    files = ShardFiles(tmp_path, plan)
    files.begin_writeback(0, 0, 100)
    assert calls == []
    assert not files.path(0).exists()
    _write(files, plan.jobs[0])
    files.begin_writeback(0, 100, 4196)
    assert [call[1:] for call in calls] == [(100, 4096, 2)]
    files.close()
    files.begin_writeback(0, 100, 4196)
    assert len(calls) == 1


def test_systems_without_the_call(tmp_path: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_SYNC_FILE_RANGE", None)
    files = ShardFiles(tmp_path, plan)
    _write(files, plan.jobs[0])
    files.begin_writeback(0, 0, 100)
    files.sync([0])
    files.close()
