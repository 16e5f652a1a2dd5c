"""Transfers when threads are few, and when they are interrupted while threads start: one line, nothing left running."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault
from loopback import LoopbackHub
from support import REPO, alter, assert_pushed, contents, files_of, npuq_process, reseal, shards

import npuq
from npuq.errors import HubError
from npuq.formats.checkpoint import Checkpoint
from npuq.hub import ShardPusher, open_remote, resolve
from npuq.hub.transfer.parallel import in_order, start_threads

SOURCE = "alice/source"
OURS = "npuq-"


class Starts:
    """Thread starts of npuq's own: of each group so many succeed, and the next one raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.allowed = 10**6
        self.error: BaseException = RuntimeError("can't start new thread")
        start, starts = threading.Thread.start, self

        def limited(thread: threading.Thread) -> None:
            if thread.name.startswith(OURS) and int(thread.name.rpartition("-")[2]) >= starts.allowed:
                raise starts.error
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", limited)


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Starts]:
    yield Starts(monkeypatch)
    monkeypatch.undo()
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not running()


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(OURS)]


@pytest.fixture
def source(hub: LoopbackHub, example_fp8: Path) -> None:
    hub.state.put(SOURCE, files_of(example_fp8))


def expect_all(checkpoint: Checkpoint) -> None:
    checkpoint.window.start([(name,) for name in checkpoint.tensors], ())


def test_no_thread_at_all(hub: LoopbackHub, source: None, artifact: Path, tmp_path: Path, starts: Starts) -> None:
    with open_remote(SOURCE, tmp_path / "window") as checkpoint:
        starts.allowed = 0
        with pytest.raises(HubError, match=r"can't start new thread: .* \(ulimit -u\); end some"):
            expect_all(checkpoint)
    for run in (
        lambda: npuq.push(artifact, REPO),
        lambda: ShardPusher(artifact, REPO),
        lambda: resolve(SOURCE),
        lambda: open_remote(SOURCE, tmp_path / "window", revision="main"),
    ):
        with pytest.raises(HubError, match="can't start new thread"):
            run()


def test_fewer_threads_do_the_same(
    hub: LoopbackHub, source: None, artifact: Path, tmp_path: Path, starts: Starts
) -> None:
    starts.allowed = 1
    npuq.push(artifact, REPO)
    assert_pushed(hub, artifact)
    assert contents(npuq.pull(REPO)) == contents(artifact)
    with open_remote(SOURCE, tmp_path / "window") as checkpoint:
        expect_all(checkpoint)
        for name in checkpoint.tensors:
            checkpoint.read(name)
            checkpoint.window.release((name,))


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_while_fetchers_start(
    hub: LoopbackHub, source: None, tmp_path: Path, starts: Starts, after: int
) -> None:
    starts.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt), open_remote(SOURCE, tmp_path / "window") as checkpoint:
        starts.allowed = after
        expect_all(checkpoint)


def test_no_thread_is_lost_to_an_interruption(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that arrives amid starting acts when all that run are known."""
    start, release, threads = threading.Thread.start, threading.Event(), []

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start_threads(lambda: bool(release.wait(10)), 3, "npuq-test", threads)
    assert sorted(thread.name for thread in threads) == sorted(running())
    assert len(threads) == 3
    release.set()


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_while_transfers_start(starts: Starts, after: int) -> None:
    starts.allowed, starts.error = after, KeyboardInterrupt()
    done: list[int] = []
    release = threading.Event()

    def work(item: int) -> None:
        release.wait(10)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        list(in_order(range(100), work, 4))
    release.set()
    time.sleep(0.2)
    assert len(done) <= after  # what had begun


@pytest.mark.parametrize(
    "arguments", [("pull", REPO), ("push", "ARTIFACT", "alice/new", "--no-verify")], ids=["pull", "push"]
)
def test_an_interrupted_command_says_so_in_one_line(
    hub: LoopbackHub, artifact: Path, arguments: tuple[str, ...]
) -> None:
    files = files_of(artifact)
    hub.state.put(REPO, files)
    alter(shards(artifact)[0])
    reseal(artifact)
    slow = r"^GET .*\.safetensors" if arguments[0] == "pull" else r"^PUT /lfs/"
    hub.faults.add(Fault(slow, bytes_per_second=50_000, times=10**6))
    process = npuq_process(*(str(artifact) if argument == "ARTIFACT" else argument for argument in arguments))
    deadline = time.monotonic() + 60
    while not hub.requests(slow) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    # click ends the line that ^C stands in.
    assert (process.returncode, out, err) == (130, "", "\nnpuq: error: interrupted\n")
