"""Digests taken behind the workers are those of the finished files, in whatever order jobs end."""

from __future__ import annotations

import hashlib
import random
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npuq.convert.hashes import ShardHashes, file_sha256
from npuq.convert.shards import ShardFiles
from npuq.errors import ConversionError
from npuq.quant.schemes import Scheme

from .test_plan import plan_of, tensors

NO_STOP = threading.Event()


def _fill(files: ShardFiles, job, generator: random.Random) -> None:
    for slot in job.outputs:
        files.write(slot.shard, slot.start, memoryview(generator.randbytes(slot.nbytes)))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tensors(), st.integers(200, 60_000), st.integers(0, 2**31), st.floats(0, 1))
def test_any_order_of_jobs(tmp_path: Path, given_tensors, max_shard_size: int, seed: int, resumed: float) -> None:
    """Some jobs were done by an earlier run; the others end in random order, on one thread or several."""
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
        _fill(files, job, generator)
        keep(job.shard, hashes.job_done(job, NO_STOP))
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


def test_a_file_that_shrinks_is_an_error(tmp_path: Path) -> None:
    plan = plan_of([("layers.0.gate_proj.weight", (64, 64), Scheme.W4A8)], 1 << 20)
    files = ShardFiles(tmp_path, plan)
    _fill(files, plan.jobs[0], random.Random(0))
    files.path(0).write_bytes(b"short")
    with pytest.raises(ConversionError, match="cut short"):
        ShardHashes(plan, files, ()).job_done(plan.jobs[0], NO_STOP)
    files.close()
