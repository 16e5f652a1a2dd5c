"""Conversion straight from the hub through faults, kills and interruptions: the same artifact all the same."""

from __future__ import annotations

import errno
import itertools
import os
import struct
import time
from pathlib import Path

import pytest
from fault_tables import CONVERT
from faults import Fault
from loopback import LoopbackHub
from streaming import OPTIONS, SOURCE, remote, without_manifest
from support import MANIFEST, kill_when, npuq_process, npuq_run

from npuq.convert import convert_checkpoint
from npuq.errors import CheckpointError, HubError
from npuq.hub import open_remote
from npuq.hub.transfer.retry import Backoff


@pytest.mark.parametrize("fault", CONVERT.values(), ids=CONVERT.keys())
def test_a_fault_is_survived(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path, backoff: Backoff, fault: Fault
) -> None:
    hub.faults.add(fault)
    with remote(tmp_path / "out", backoff) as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert hub.faults.hits == fault.times
    assert without_manifest(tmp_path / "out") == expected


def test_a_hub_that_goes_away_and_comes_back(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path, backoff: Backoff
) -> None:
    hub.faults.add(Fault(r"^GET .*\.safetensors", after=12, status=500, times=10**6))
    with remote(tmp_path / "out", backoff) as checkpoint, pytest.raises(HubError, match="the hub keeps failing"):
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert not (tmp_path / "out" / MANIFEST).exists()
    hub.faults.clear()
    with remote(tmp_path / "out", backoff) as checkpoint:
        summary = convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert summary.jobs_resumed > 0
    assert without_manifest(tmp_path / "out") == expected


def test_disk_full(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        if "download" in str(Path(f"/proc/self/fd/{descriptor}").readlink()) and next(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = "download: cannot be written: No space left on device; make room, or give a smaller --download-window"
    with remote(tmp_path / "out") as checkpoint, pytest.raises(CheckpointError, match=message):
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert without_manifest(tmp_path / "out") == expected


def test_killed_and_run_again(hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["convert", SOURCE, output, "--method", "minmax", "--max-shard-size", "2MB", "--quiet"]
    arguments += ["--download-window", "2MB"]
    for requests in (12, 25):
        start = len(hub.requests(r"^GET .*\.safetensors"))
        process = npuq_process(*arguments)
        killed = kill_when(
            process, lambda wanted=start + requests: len(hub.requests(r"^GET .*\.safetensors")) >= wanted
        )
        assert killed
        assert not (output / MANIFEST).exists()
    done = npuq_run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert without_manifest(output) == expected
    assert not (output / "npuq" / "download").exists()


def test_what_was_fetched_before_an_interruption_is_used(
    hub: LoopbackHub, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = tmp_path / "window", []
    with open_remote(SOURCE, folder, window_bytes=10**9) as checkpoint:
        names = [name for name, info in checkpoint.tensors.items() if info.nbytes > 1000][:40]
        checkpoint.window.start([(name,) for name in names], ())
        before = {name: checkpoint.read(name) for name in names}
        checkpoint.window.release((names[0],))
    (folder / "notes.txt").write_text("not ours")
    hub.log.clear()
    with open_remote(SOURCE, folder, window_bytes=10**9) as checkpoint:
        asked = len(hub.log)
        checkpoint.window.start([(name,) for name in names], {names[0]})
        assert all(
            bool((checkpoint.read(name).view(-1) == before[name].view(-1)).all())
            for name in names[1:]
            if before[name].element_size() > 1
        )
        assert len(hub.log) == asked
        for name in names[1:]:
            checkpoint.window.release((name,))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_what_another_commit_left_in_the_window_is_not_used(
    hub: LoopbackHub, source: str, example_fp8: Path, tmp_path: Path
) -> None:
    """The same shard, size and range, and other bytes."""

    def first(window: Path) -> bytes:
        with open_remote(SOURCE, window) as checkpoint:
            name = next(name for name, info in checkpoint.tensors.items() if info.nbytes > 1000)
            checkpoint.window.start([(name,)], ())
            memory = bytearray(checkpoint.info(name).nbytes)
            checkpoint.read_bytes(name, 0, memoryview(memory))
            return bytes(memory)

    before = first(tmp_path / "window")
    assert list((tmp_path / "window").iterdir())
    for path in example_fp8.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        content[8 + length :] = bytes(255 - byte for byte in content[8 + length :])
        hub.state.put(SOURCE, {path.name: bytes(content)})
    assert first(tmp_path / "window") == bytes(255 - byte for byte in before)


def test_interrupt_wakes_a_waiting_read(hub: LoopbackHub, source: str, tmp_path: Path) -> None:
    import threading

    with open_remote(SOURCE, tmp_path / "window") as checkpoint:
        hub.faults.add(Fault(r"^GET .*\.safetensors", bytes_per_second=10_000, times=10**6))
        name = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].nbytes)
        checkpoint.window.start([(name,)], ())
        raised: list[Exception] = []

        def read() -> None:
            try:
                checkpoint.read(name)
            except CheckpointError as error:
                raised.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.01)
        checkpoint.window.interrupt()
        thread.join(timeout=5)
        assert not thread.is_alive()
        assert "interrupted" in str(raised[0])
