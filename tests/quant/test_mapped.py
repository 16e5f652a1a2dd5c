"""Mapped files that somebody shortens: an error, never a signal; and signals that are no business of ours."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from npuq.errors import CheckpointError
from npuq.formats.checkpoint import Checkpoint
from npuq.native import mapped
from npuq.native.library import levels, library

needs_library = pytest.mark.skipif(not levels(), reason="the native library is not built here (no C compiler)")

ROWS = 20_000  # of 64 floats: 5 MB, far more than a page


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(ROWS, 64), "b": torch.ones(ROWS, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def _cut(directory: Path, part: float) -> None:
    path = directory / "model.safetensors"
    os.truncate(path, int(path.stat().st_size * part))


@needs_library
def test_pages_that_are_gone_read_as_zeros_and_are_told(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        first, second = checkpoint.view("a"), checkpoint.view("b")
        assert checkpoint.files.watched
        checkpoint.files.check()
        _cut(directory, 0.75)
        assert float(first.sum()) == ROWS * 64
        assert 0 < float(second.sum()) < ROWS * 64  # by whatever threads torch has
        assert float(second[-1].sum()) == 0
    with pytest.raises(CheckpointError, match=r"model\.safetensors: became shorter while it was in use"):
        checkpoint.files.check()


@needs_library
def test_a_file_that_grew_back_stays_lost(directory: Path) -> None:
    content = (directory / "model.safetensors").read_bytes()
    with Checkpoint.open(directory) as checkpoint:
        view = checkpoint.view("b")
        _cut(directory, 0.5)
        view.sum()
        (directory / "model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="became shorter"):
            checkpoint.files.check()
    with Checkpoint.open(directory) as again:
        assert float(again.view("b").sum()) == ROWS * 64
        again.files.check()


def test_without_the_library_the_size_is_all_there_is(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "library", lambda: None)
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.view("a")
        assert not checkpoint.files.watched
        checkpoint.files.check()
        _cut(directory, 0.99)
        with pytest.raises(CheckpointError, match="became shorter"):
            checkpoint.files.check()


def test_a_file_cut_before_it_is_read(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        _cut(directory, 0.75)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: truncated: its header describes"):
            checkpoint.view("a")


def test_a_file_cut_before_it_is_mapped(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.read("a")
        _cut(directory, 0.75)
        assert float(checkpoint.view("a").sum()) == ROWS * 64
        with pytest.raises(CheckpointError, match=r"model\.safetensors: became shorter while tensor 'b' was read"):
            checkpoint.view("b")
    with Checkpoint.open(_whole(directory)) as checkpoint:
        checkpoint.read("a")
        _cut(directory, 0)
        with pytest.raises(CheckpointError, match="cannot be mapped into memory"):
            checkpoint.view("a")


def _whole(directory: Path) -> Path:
    save_file({"a": torch.ones(4, 64)}, directory / "model.safetensors")
    return directory


@needs_library
def test_maps_are_watched_for_as_long_as_they_are_used(directory: Path) -> None:
    found = library()
    assert found is not None
    checkpoint = Checkpoint.open(directory)
    view = checkpoint.view("a")
    (start,) = (each.start for each in checkpoint.files._maps.values())
    _cut(directory, 0.1)
    view.sum()
    checkpoint.close()
    del checkpoint
    gc.collect()
    assert found.npuq_is_lost(start)  # the tensor still has it
    del view
    gc.collect()
    assert not found.npuq_is_lost(start)


OTHERS = """
import ctypes, faulthandler, mmap, os, sys, tempfile
from pathlib import Path
import torch
from npuq.formats.checkpoint import Checkpoint
if "traced" in sys.argv:
    faulthandler.enable()
checkpoint = Checkpoint.open(sys.argv[1])
view = checkpoint.view("b")
if "own" in sys.argv:
    os.truncate(Path(sys.argv[1]) / "model.safetensors", 5000)
    view.sum()
    print("zeros", flush=True)
if "sent" in sys.argv:
    os.kill(os.getpid(), 7)
with tempfile.TemporaryFile() as file:
    file.truncate(100_000)
    other = mmap.mmap(file.fileno(), 0)
    file.truncate(1)
    ctypes.string_at(ctypes.addressof(ctypes.c_char.from_buffer(other)) + 50_000, 1)
"""


@needs_library
@pytest.mark.parametrize("words", [[], ["own"], ["sent"], ["own", "traced"]])
def test_signals_for_others_do_what_they_did(directory: Path, words: list[str]) -> None:
    """A map that is not ours, and a signal that was sent, end the process as they always did."""
    done = subprocess.run([sys.executable, "-c", OTHERS, str(directory), *words], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS, done.stderr
    assert done.stdout == ("zeros\n" if "own" in words else "")
    assert ("Fatal Python error: Bus error" in done.stderr) == ("traced" in words)
