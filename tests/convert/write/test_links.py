"""Links and pipes under npuq's own names, put there by somebody else: nothing is written through them, none is waited
for. And the files that may be open at a time."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from calibrated import add_tokenizer, text

from npuq.convert import convert_checkpoint
from npuq.errors import ConversionError, NpuqError
from npuq.formats.output_files import new_file
from npuq.formats.safetensors import read_header, write_tensors
from npuq.runtime.evaluation.perplexity import Evaluation
from npuq.verification.evaluations import save_evaluation

OPTIONS: dict[str, Any] = {"method": "minmax", "max_shard_size": 60_000}
PRECIOUS = b"precious"


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A call that waits for the other end of a pipe ends the test."""

    def end(number: int, frame: FrameType | None) -> None:
        raise AssertionError("waits for a pipe")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside.txt"
    path.write_bytes(PRECIOUS)
    return path


@pytest.fixture
def half_done(rig, v3_source, tmp_path) -> Path:
    output = tmp_path / "half"
    assert rig(v3_source, output, options=OPTIONS, kill_at=100, slow=0.001, calls=["pwrite"])["killed"]
    return output


def put(kind: str, path: Path, outside: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(outside)
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_the_place_where_small_files_are_prepared(kind, v3_source, v3_artifact, outside, tmp_path, tree):
    output = tmp_path / "out"
    put(kind, output / "npuq" / "partial", outside)
    assert convert_checkpoint(v3_source, output, **OPTIONS).status == "converted"
    assert outside.read_bytes() == PRECIOUS
    assert tree(output) == tree(v3_artifact)


def test_a_folder_of_ours_that_leads_elsewhere(v3_source, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "npuq").symlink_to(elsewhere)
    with pytest.raises(ConversionError, match="npuq: cannot be written: is a link to another folder; choose an output"):
        convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)
    assert convert_checkpoint(v3_source, tmp_path / "out", dry_run=True, **OPTIONS).refusal is not None
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_journal_that_is_elsewhere(dry_run, v3_source, half_done, tmp_path):
    journal, other = half_done / "npuq" / "progress.jsonl", tmp_path / "other.jsonl"
    journal.rename(other)
    journal.symlink_to(other)
    before = other.read_bytes()
    try:
        found = convert_checkpoint(v3_source, half_done, dry_run=dry_run, **OPTIONS).refusal
    except ConversionError as error:
        found = str(error)
    assert found is not None and str(half_done) in found and "choose an output that can be written" in found
    assert other.read_bytes() == before


@pytest.mark.parametrize("kind", ["link", "whole shard elsewhere", "pipe"])
def test_a_shard_that_is_elsewhere(kind, v3_source, half_done, outside):
    shard = sorted(half_done.glob("*.safetensors"))[0]
    if kind.startswith("whole"):
        outside.write_bytes(shard.read_bytes())
    before = outside.read_bytes()
    put("pipe" if kind == "pipe" else "link", shard, outside)
    with pytest.raises(ConversionError, match=f"{shard.name}: cannot be written: .*choose an output that can be"):
        convert_checkpoint(v3_source, half_done, **OPTIONS)
    assert outside.read_bytes() == before


@pytest.mark.parametrize("name", ["partial.json", "scratch-inner.bin", "scratch-3.bin"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_hidden_states(name, kind, write, rig, outside, tmp_path, tree):
    source = write(tmp_path / "source")
    add_tokenizer(source)
    (tmp_path / "text.txt").write_text(text(1000))
    options = {"method": "gptq", "calibration": [str(tmp_path / "text.txt"), 4, 16], "workers": 1}
    assert rig(source, tmp_path / "out", options=options, kill_at=6, calls=["replace"])["killed"]
    shutil.copytree(tmp_path / "out", tmp_path / "undisturbed")
    put(kind, tmp_path / "out" / "npuq" / "calibration" / name, outside)
    for output in ("out", "undisturbed"):
        assert rig(source, tmp_path / output, options=options)["summary"]["status"] == "converted"
    assert outside.read_bytes() == PRECIOUS
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_the_results_of_an_evaluation(kind, v3_artifact, outside, tmp_path):
    artifact = tmp_path / "artifact"
    shutil.copytree(v3_artifact, artifact)
    put(kind, artifact / "npuq" / "partial", outside)
    save_evaluation(artifact, Evaluation(10, 2.0, None, None, None), "text", "0" * 64, 16)
    assert outside.read_bytes() == PRECIOUS
    assert json.loads((artifact / "npuq" / "manifest.json").read_text())["evaluations"]


def test_a_small_file_of_tensors(outside, tmp_path):
    (tmp_path / "rope.safetensors").symlink_to(outside)
    write_tensors(tmp_path / "rope.safetensors", {"cos": np.zeros(2, np.float32)}, {})
    assert outside.read_bytes() == PRECIOUS
    assert "cos" in read_header(tmp_path / "rope.safetensors")[0]


def test_a_new_file_is_synced_by_the_descriptor_that_wrote_it(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(os.fstat(descriptor).st_size), sync(descriptor)))
    with new_file(tmp_path / "file") as file:
        file.write(b"12345")
        descriptor = file.fileno()
        assert synced == []
    assert synced == [5]
    with pytest.raises(OSError):
        os.fstat(descriptor)


@contextmanager
def few_files(more: int) -> Iterator[None]:
    """Meanwhile this process may open so many files beside those that it has open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(path.name) for path in Path("/proc/self/fd").iterdir()}
    free = [number for number in range(soft) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[more], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_continued_run_does_not_keep_all_shards_open(rig, write, tmp_path):
    """Every shard is there, and each is read again."""
    source, output = write(tmp_path / "source", shards=1), tmp_path / "out"
    options = {"method": "minmax", "max_shard_size": 4_000}
    assert rig(source, output, options=options | {"workers": 1}, kill_at=2, calls=["replace"])["killed"]
    assert len(list(output.glob("*.safetensors"))) > 60
    with few_files(16):
        assert convert_checkpoint(source, output, **options, workers=2).jobs_resumed > 60


def test_too_many_open_files_are_called_that(v3_source, half_done, tmp_path):
    convert_checkpoint(v3_source, tmp_path / "first", **OPTIONS)  # all modules are loaded
    said = {}
    for more in range(10):
        output = tmp_path / str(more)
        shutil.copytree(half_done, output)
        try:
            with few_files(more):
                convert_checkpoint(v3_source, output, **OPTIONS, workers=1)
        except NpuqError as error:
            said[more] = str(error)
    assert len(said) > 5
    for line in said.values():
        assert "Too many open files; raise the limit (ulimit -n)" in line
        assert "remove" not in line and "make room" not in line and "fetch" not in line
