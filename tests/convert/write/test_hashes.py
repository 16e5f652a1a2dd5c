"""Digests taken behind the workers are those of the finished files, in whatever order jobs end."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import plan_of, tensors

from npuq.convert.plan.plan import Job, Plan
from npuq.convert.write import hashes as hashes_module
from npuq.convert.write.hashes import ShardHashes
from npuq.convert.write.journal import JobEntry, Record
from npuq.convert.write.shards import ShardFiles
from npuq.convert.write.workspace import Written
from npuq.errors import ConversionError
from npuq.formats.schemes import Scheme
from npuq.inputs.files import file_sha256
from npuq.native import sha256
from npuq.quant.weight_error import ErrorSums

NO_STOP = threading.Event()
ENTRY = JobEntry(ErrorSums(0.0, 0.0), b"", b"")


needs_pairs = pytest.mark.skipif(not sha256.two_at_once(), reason="this CPU hashes one stream at a time")


@pytest.fixture(params=["two at once", "hashlib"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "hashlib":
        monkeypatch.setattr(sha256, "_native", lambda: None)
    elif not sha256.two_at_once():
        pytest.skip("this CPU hashes one stream at a time")


def _of_shards(shards: int, jobs: int) -> Plan:
    """A plan of equal jobs, so many in each shard."""
    equal = [(f"layers.{i:03}.gate_proj.weight", (256, 512), Scheme.W4A8) for i in range(shards * jobs)]
    each = plan_of(equal, 1 << 30).jobs[0].output_bytes
    plan = plan_of(equal, each * (jobs + 1) - 1)
    assert [len(shard.jobs) for shard in plan.shards] == [jobs] * shards
    return plan


def _sums(files: ShardFiles, plan: Plan) -> dict[int, str]:
    return {n: hashlib.sha256(files.path(n).read_bytes()).hexdigest() for n in range(len(plan.shards))}


def _fill(files: ShardFiles, job: Job, generator: random.Random) -> Written | None:
    """Write a job's outputs; what memory still has of them, where they lie together."""
    slots = sorted(job.outputs, key=lambda slot: slot.start)
    pieces = [memoryview(generator.randbytes(slot.nbytes)) for slot in slots]
    for slot, piece in zip(slots, pieces, strict=True):
        files.write(slot.shard, slot.start, piece)
    together = all(slot.start + slot.nbytes == after.start for slot, after in pairwise(slots))
    return Written(slots[0].start, tuple(pieces)) if together else None


@pytest.mark.usefixtures("way")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors(), st.integers(200, 60_000), st.integers(0, 2**31), st.floats(0, 1))
def test_any_order_of_jobs(tmp_path: Path, given_tensors, max_shard_size: int, seed: int, resumed: float) -> None:
    """Some jobs were done by an earlier run, some shards hashed; the others end in random order, in memory, only in the
    file, or in memory that is needed again before long."""
    plan, generator = plan_of(given_tensors, max_shard_size), random.Random(seed)
    jobs = list(plan.jobs)
    generator.shuffle(jobs)
    before = jobs[: int(len(jobs) * resumed)]
    files = ShardFiles(tmp_path, plan)
    for job in before:
        _fill(files, job, generator)
    filled = [n for n, shard in enumerate(plan.shards) if {job.index for job in before}.issuperset(shard.jobs)]
    hashed = {n: "before" for n in filled if generator.random() < 0.3}
    hashes = ShardHashes(plan, files, Record({job.index: ENTRY for job in before}, dict(hashed)))
    digests: dict[int, str] = {}

    def keep(complete: list[tuple[int, str]]) -> None:
        for shard, digest in complete:
            assert shard not in digests
            digests[shard] = digest

    for number in filled:
        if number not in hashed:
            keep(hashes.advance(number, NO_STOP))
    lent: list[Written] = []
    for job in jobs[len(before) :]:
        written = _fill(files, job, generator)
        if written is not None:
            lent.append(written)
        keep(hashes.job_done(job, NO_STOP, written if generator.random() < 0.7 else None))
        if lent and generator.random() < 0.3:
            lent.pop(generator.randrange(len(lent))).take_back()
    files.close()
    expected = {n: digest for n, digest in _sums(files, plan).items() if n not in hashed}
    assert digests == expected
    assert digests == {number: file_sha256(files.path(number), ConversionError) for number in expected}


@pytest.mark.usefixtures("way")
def test_nothing_is_hashed_before_it_is_final(tmp_path: Path) -> None:
    plan = _of_shards(1, 3)
    files, generator = ShardFiles(tmp_path, plan), random.Random(0)
    hashes = ShardHashes(plan, files, Record())
    for job in (plan.jobs[2], plan.jobs[0]):
        _fill(files, job, generator)
        assert hashes.job_done(job, NO_STOP) == []
    _fill(files, plan.jobs[1], generator)
    assert hashes.job_done(plan.jobs[1], NO_STOP) == [(0, file_sha256(files.path(0), ConversionError))]
    files.close()


@pytest.mark.usefixtures("way")
def test_what_memory_has_is_not_read_back(tmp_path: Path) -> None:
    """Three shards that are cut short once written, jobs by turns and with neighbours swapped: all is in memory."""
    plan = _of_shards(3, 4)
    files, generator = ShardFiles(tmp_path, plan), random.Random(0)
    written = {job.index: _fill(files, job, generator) for job in plan.jobs}
    expected = _sums(files, plan)
    for number in range(3):
        os.truncate(files.path(number), 0)
    hashes = ShardHashes(plan, files, Record())
    told: list[tuple[int, str]] = []
    turns = plan.turns
    for first, second in zip(turns[::2], turns[1::2], strict=True):
        for job in (second, first):
            told += hashes.job_done(job, NO_STOP, written[job.index])
    assert dict(told) == expected
    assert len(told) == 3
    assert all(each is not None and each.taken_back for each in written.values())
    files.close()


@needs_pairs
def test_neighbours_are_hashed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of two shards but what the last job of one leaves to the other; what is ahead waits, and is given back."""
    plan, together = _of_shards(2, 5), 0

    def counted(first: sha256.Digest, data: memoryview, second: sha256.Digest, more: memoryview) -> None:
        nonlocal together
        assert len(data) == len(more)
        together += len(data)
        sha256.update_two(first, data, second, more)

    monkeypatch.setattr(hashes_module, "update_two", counted)
    files, generator = ShardFiles(tmp_path, plan), random.Random(0)
    hashes, told = ShardHashes(plan, files, Record()), []
    for left, right in zip(*[shard.jobs for shard in plan.shards], strict=True):
        ahead = _fill(files, plan.jobs[left], generator)
        assert ahead is not None
        told += hashes.job_done(plan.jobs[left], NO_STOP, ahead)
        assert ahead.taken_back == (left == plan.shards[0].jobs[-1])  # complete, it waits for nobody
        told += hashes.job_done(plan.jobs[right], NO_STOP, _fill(files, plan.jobs[right], generator))
        assert ahead.taken_back
    files.close()
    assert dict(told) == _sums(files, plan)
    assert [number for number, _ in told] == [0, 1]
    assert together >= plan.shards[0].nbytes - plan.jobs[0].output_bytes


@needs_pairs
def test_a_neighbour_that_nobody_writes_holds_nothing_up(tmp_path: Path) -> None:
    plan = _of_shards(2, 3)
    files, generator = ShardFiles(tmp_path, plan), random.Random(0)
    hashes, told = ShardHashes(plan, files, Record()), []
    for index in plan.shards[1].jobs:
        assert told == []
        told += hashes.job_done(plan.jobs[index], NO_STOP, _fill(files, plan.jobs[index], generator))
    assert told == [(1, file_sha256(files.path(1), ConversionError))]
    for index in plan.shards[0].jobs:
        told += hashes.job_done(plan.jobs[index], NO_STOP, _fill(files, plan.jobs[index], generator))
    assert told[1:] == [(0, file_sha256(files.path(0), ConversionError))]
    files.close()


@pytest.mark.usefixtures("way")
def test_two_finished_shards_are_told_at_once_or_one_by_one(tmp_path: Path) -> None:
    """After an interruption: every job is done, no shard is hashed, and whoever comes first may hash both."""
    plan = _of_shards(2, 3)
    files, generator = ShardFiles(tmp_path, plan), random.Random(0)
    for job in plan.jobs:
        _fill(files, job, generator)
    hashes = ShardHashes(plan, files, Record({job.index: ENTRY for job in plan.jobs}))
    told = hashes.advance(1, NO_STOP) + hashes.advance(0, NO_STOP)
    assert sorted(told) == sorted(_sums(files, plan).items())
    files.close()


@pytest.mark.usefixtures("way")
def test_a_conversion_that_ends_hashes_no_more(tmp_path: Path) -> None:
    plan, stop = _of_shards(1, 1), threading.Event()
    files = ShardFiles(tmp_path, plan)
    hashes = ShardHashes(plan, files, Record())
    stop.set()
    assert hashes.job_done(plan.jobs[0], stop, _fill(files, plan.jobs[0], random.Random(0))) == []
    assert hashes.advance(0, NO_STOP) == [(0, file_sha256(files.path(0), ConversionError))]
    files.close()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("shards", [1, 2, 5])
def test_threads_at_once(tmp_path: Path, shards: int) -> None:
    """Whoever comes while a pair is hashed leaves its job to the other; memory is needed again all the while."""
    plan = _of_shards(shards, 64)
    files, left, told = ShardFiles(tmp_path, plan), iter(plan.turns), []
    hashes, lock = ShardHashes(plan, files, Record()), threading.Lock()

    def work(seed: int) -> None:
        generator, lent = random.Random(seed), []
        while True:
            with lock:
                job = next(left, None)
            if job is None:
                return
            written = _fill(files, job, generator)
            assert written is not None
            told.extend(hashes.job_done(job, NO_STOP, written))
            lent.append(written)
            if len(lent) > 2:
                lent.pop(0).take_back()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    assert dict(told) == _sums(files, plan)
    assert len(told) == shards


def test_memory_that_is_being_hashed_is_waited_for() -> None:
    written, taken = Written(100, [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")]), threading.Event()
    assert (written.start, written.end) == (100, 107)
    owner = threading.Thread(target=lambda: (written.take_back(), taken.set()))
    with written.held(102) as piece:
        assert piece == b"c"
        owner.start()
        assert not taken.wait(0.05)
        assert not written.taken_back
    assert taken.wait(10)
    owner.join()
    with written.held(102) as piece:
        assert piece is None


def test_bytes_from_any_position() -> None:
    written = Written(10, [memoryview(b"abc"), memoryview(b""), memoryview(b"defg")])
    for position in range(10, 17):
        with written.held(position) as piece:
            assert piece == (b"abc"[position - 10 :] or b"defg"[position - 13 :])


@pytest.mark.usefixtures("way")
def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    plan = _of_shards(1, 1)
    files = ShardFiles(tmp_path, plan)
    _fill(files, plan.jobs[0], random.Random(0))
    files.path(0).write_bytes(b"short")
    with pytest.raises(ConversionError, match="cut short"):
        ShardHashes(plan, files, Record()).job_done(plan.jobs[0], NO_STOP)
    files.close()


@pytest.mark.usefixtures("way")
def test_a_file_that_is_gone_is_an_error(tmp_path: Path) -> None:
    plan = _of_shards(1, 1)
    files = ShardFiles(tmp_path, plan)
    _fill(files, plan.jobs[0], random.Random(0))
    files.path(0).unlink()
    with pytest.raises(ConversionError, match="cannot be read back"):
        ShardHashes(plan, files, Record()).job_done(plan.jobs[0], NO_STOP)
    files.close()
