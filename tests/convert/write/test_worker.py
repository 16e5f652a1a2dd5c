"""One job: what is written does not depend on the chunks, and what memory still has of it is what the file holds."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from npuq.convert import convert_checkpoint
from npuq.convert.plan.prepare import prepare
from npuq.convert.write import pipeline
from npuq.convert.write.shards import ShardFiles
from npuq.convert.write.worker import run_job
from npuq.convert.write.workspace import Workspace, Written
from npuq.formats.schemes import Scheme
from npuq.native import library as native


@pytest.mark.parametrize("torch_only", [False, True])
@pytest.mark.parametrize("chunk_elements", [130, 3000, 1 << 20])
def test_what_is_kept_is_what_was_written(
    v3_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_elements: int, torch_only: bool
) -> None:
    if torch_only:
        monkeypatch.setattr(native, "library", lambda: None)
    elif native.library() is None:
        pytest.skip("no native library")
    prepared = prepare(v3_source, "w4a8", "minmax", 10**9)
    files, workspace, kept = ShardFiles(tmp_path, prepared.plan), Workspace(chunk_elements), []
    with prepared.checkpoint:
        for job in prepared.plan.jobs:
            written = run_job(job, prepared.source, files, workspace, threading.Event()).written
            if written is not None:
                start, end = min(slot.start for slot in job.outputs), max(s.start + s.nbytes for s in job.outputs)
                assert (written.start, written.end) == (start, end)
                assert _bytes_of(written) == files.path(job.shard).read_bytes()[start:end]
                kept.append(job)
    files.close()
    # Where torch computes, or codes are many, memory is left to others.
    linears = [job for job in prepared.plan.jobs if job.scheme is not Scheme.FLOAT and not torch_only]
    assert kept == [job for job in linears if job.outputs[0].nbytes <= workspace.kept_bytes]
    assert torch_only or 0 < len(kept) <= len(linears)
    whole = ShardFiles(tmp_path / "whole", prepared.plan)
    (tmp_path / "whole").mkdir()
    again = prepare(v3_source, "w4a8", "minmax", 10**9)
    with again.checkpoint:
        for job in again.plan.jobs:
            run_job(job, again.source, whole, Workspace(1 << 24), threading.Event())
    whole.close()
    for number in range(len(prepared.plan.shards)):
        assert files.path(number).read_bytes() == whole.path(number).read_bytes()


def _bytes_of(written: Written) -> bytes:
    found = b""
    while len(found) < written.end - written.start:
        with written.held(written.start + len(found)) as piece:
            assert piece is not None
            found += piece
    return found


def test_no_worker_outlives_the_conversion(v3_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python aborts when it exits while a thread still frees its tensors."""

    class Slow(Workspace):
        def __del__(self) -> None:
            time.sleep(0.2)

    monkeypatch.setattr(pipeline, "Workspace", Slow)
    convert_checkpoint(v3_source, tmp_path / "out", method="minmax", workers=2)
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("npuq-")}
    assert names <= {"npuq-engine"}  # of a server that other tests share


def test_a_workspace_gives_the_same_memory_again() -> None:
    workspace = Workspace(100)
    first = workspace.read(1000)
    assert workspace.read(500).data_ptr() == first.data_ptr()
    assert workspace.read(2000).shape == (2000,)
    codes = workspace.codes(10, 20)
    assert codes.dtype is torch.int8
    assert codes.shape == (10, 20)
    assert workspace.codes(20, 10).data_ptr() == codes.data_ptr()
    workspace.release()
    assert workspace.codes(3, 4).shape == (3, 4)


def test_codes_that_are_lent_stay_as_they_are() -> None:
    """Three jobs' codes: for a fourth, those that were given back, or else those that were lent first."""
    workspace = Workspace(100)
    lent = []
    for value in (1, 2, 3):
        codes = workspace.codes(5, 4).fill_(value)
        lent.append((codes, Written(0, [memoryview(codes.numpy()).cast("B")])))
        workspace.lend(lent[-1][1])
    (first, of_first), (second, of_second), (third, of_third) = lent
    assert len({codes.data_ptr() for codes, _ in lent}) == 3
    of_second.take_back()
    assert workspace.codes(4, 5).data_ptr() == second.data_ptr()
    assert not of_first.taken_back
    of_fourth = Written(0, [memoryview(second.numpy()).cast("B")])
    workspace.lend(of_fourth)
    assert workspace.codes(5, 4).data_ptr() == first.data_ptr()
    assert of_first.taken_back
    assert not of_third.taken_back
    assert not of_fourth.taken_back
    assert bool((third == 3).all())
    workspace.release()
    assert of_third.taken_back
    assert of_fourth.taken_back
