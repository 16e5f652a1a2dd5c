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

from npuq.convert.hashes import ShardHashes, Written, file_sha256
from npuq.convert.shards import ShardFiles
from npuq.errors import ConversionError
from npuq.quant.schemes import Scheme

from .test_plan import plan_of, tensors

NO_STOP = threading.Event()


def _fill(files: ShardFiles, job, generator: random.Random) -> Written | None:
    """Write a job's outputs; what memory still has of them, where they lie together."""
    slots = sorted(job.outputs, key=lambda slot: slot.start)
    pieces = [memoryview(generator.randbytes(slot.nbytes)) for slot in slots]
    for slot, piece in zip(slots, pieces, strict=True):
        files.write(slot.shard, slot.start, piece)
    together = all(slot.start + slot.nbytes == after.start for slot, after in pairwise(slots))
    return Written(slots[0].start, tuple(pieces)) if together else None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors(), st.integers(200, 60_000), st.integers(0, 2**31), st.floats(0, 1))
def test_any_order_of_jobs(tmp_path: Path, given_tensors, max_shard_size: int, seed: int, resumed: float) -> None:
    """Some jobs were done by an earlier run; the others end in random order, in memory or only in the file."""
    plan, generator = plan_of(given_tensors, max_shard_size), random.Random(seed)
    jobs = list(plan.jobs)
    generator.shuffle(jobs)
    before = jobs[: int(len(jobs) * resumed)]
    files = ShardFiles(tmp_path, plan)
    for job in before:
        _fill(files, job, generator)
    hashes = ShardHashes(plan, files, {job.index for job in before})
    digests: dict[int, str] = {}

    def keep(shard: int, digest: str | None) -> None:
        if digest is not None:
            assert shard not in digests
            digests[shard] = digest

    for number, shard in enumerate(plan.shards):
        if {job.index for job in before}.issuperset(shard.jobs):
            keep(number, hashes.advance(number, NO_STOP))
    for job in jobs[len(before) :]:
        written = _fill(files, job, generator)
        keep(job.shard, hashes.job_done(job, NO_STOP, written if generator.random() < 0.5 else None))
    files.close()
    expected = {n: hashlib.sha256(files.path(n).read_bytes()).hexdigest() for n in range(len(plan.shards))}
    assert digests == expected
    assert digests == {number: file_sha256(files.path(number)) for number in expected}


def test_nothing_is_hashed_before_it_is_final(tmp_path: Path) -> None:
    plan = plan_of([(f"layers.{i}.gate_proj.weight", (64, 64), Scheme.W4A8) for i in range(3)], 1 << 20)
    files, generator = ShardFiles(tmp_path, plan), random.Random(0)
    hashes = ShardHashes(plan, files, ())
    for job in (plan.jobs[2], plan.jobs[0]):
        _fill(files, job, generator)
        assert hashes.job_done(job, NO_STOP) is None
    _fill(files, plan.jobs[1], generator)
    assert hashes.job_done(plan.jobs[1], NO_STOP) == file_sha256(files.path(0))


def test_what_memory_has_is_not_read_back(tmp_path: Path) -> None:
    """A shard of three jobs that is cut short behind the first: the others are hashed as they were written."""
    plan = plan_of([(f"layers.{i}.gate_proj.weight", (64, 64), Scheme.W4A8) for i in range(3)], 1 << 20)
    files, generator = ShardFiles(tmp_path, plan), random.Random(0)
    written = [_fill(files, job, generator) for job in plan.jobs]
    expected = file_sha256(files.path(0))
    hashes = ShardHashes(plan, files, ())
    assert hashes.job_done(plan.jobs[0], NO_STOP) is None
    os.truncate(files.path(0), min(slot.start for slot in plan.jobs[1].outputs))
    assert hashes.job_done(plan.jobs[1], NO_STOP, written[1]) is None
    assert hashes.job_done(plan.jobs[2], NO_STOP, written[2]) == expected
    files.close()


def test_two_threads_at_once(tmp_path: Path) -> None:
    """Whoever comes while a shard is hashed leaves its job to the other, which reads it back."""
    plan = plan_of([(f"layers.{i}.gate_proj.weight", (64, 64), Scheme.W4A8) for i in range(64)], 1 << 24)
    files, left, digests = ShardFiles(tmp_path, plan), iter(plan.jobs), []
    hashes, lock = ShardHashes(plan, files, ()), threading.Lock()

    def work(seed: int) -> None:
        generator = random.Random(seed)
        while True:
            with lock:
                job = next(left, None)
            if job is None:
                return
            digests.append(hashes.job_done(job, NO_STOP, _fill(files, job, generator)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files.close()
    assert [digest for digest in digests if digest] == [file_sha256(files.path(0))]


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    plan = plan_of([("layers.0.gate_proj.weight", (64, 64), Scheme.W4A8)], 1 << 20)
    files = ShardFiles(tmp_path, plan)
    _fill(files, plan.jobs[0], random.Random(0))
    files.path(0).write_bytes(b"short")
    with pytest.raises(ConversionError, match="cut short"):
        ShardHashes(plan, files, ()).job_done(plan.jobs[0], NO_STOP)
    files.close()
