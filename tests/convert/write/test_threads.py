"""Threads that start: an interruption meanwhile, and a system that has no more of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest
from calibrated import add_tokenizer, text

from npuq.convert import CalibrationText, convert_checkpoint
from npuq.errors import ConversionError
from npuq.parallel.pool import Pool
from npuq.parallel.threads import held_signals, start_all
from npuq.verification import verify

OPTIONS = {"method": "minmax", "max_shard_size": 60_000}


def ours() -> list[threading.Thread]:
    """Threads of conversion: those of a server that other tests share live on."""
    names = {thread: thread.name for thread in threading.enumerate()}
    return [thread for thread, name in names.items() if name.startswith("npuq-") and name != "npuq-engine"]


@pytest.fixture
def starts(monkeypatch):
    """Have something done with the n-th thread that is started, after it was."""
    original = threading.Thread.start

    def set_up(number, act):
        count = 0

        def start(thread):
            nonlocal count
            count += 1
            if count == number:
                act(thread, original)
            else:
                original(thread)

        monkeypatch.setattr(threading.Thread, "start", start)

    return set_up


def interrupts(thread, original):
    original(thread)
    os.kill(os.getpid(), signal.SIGINT)


def refuses(thread, original):
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize("number", range(1, 7))
def test_interrupted_while_workers_start(number, starts, v3_source, v3_artifact, tmp_path, tree, monkeypatch):
    """The syncer's thread, then five workers: all are found and joined, and what they did is kept."""
    with monkeypatch.context() as patch:
        starts(number, interrupts)
        with pytest.raises(KeyboardInterrupt):
            convert_checkpoint(v3_source, tmp_path / "out", workers=5, **OPTIONS)
        assert ours() == []
        patch.undo()
    monkeypatch.undo()
    convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)
    assert tree(tmp_path / "out") == tree(v3_artifact)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_no_more_threads_for_workers(number, starts, v3_source, v3_artifact, tmp_path, tree, monkeypatch):
    starts(number, refuses)
    with pytest.raises(ConversionError, match=r"starts only \d of \d threads; give fewer --workers") as caught:
        convert_checkpoint(v3_source, tmp_path / "out", workers=5, **OPTIONS)
    assert "\n" not in str(caught.value) and ours() == []
    monkeypatch.undo()
    convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)
    assert tree(tmp_path / "out") == tree(v3_artifact)


@pytest.mark.parametrize("act", [interrupts, refuses])
@pytest.mark.parametrize("number", [1, 3])
def test_pools(act, number, starts):
    starts(number, act)
    with pytest.raises((KeyboardInterrupt, ConversionError)):
        Pool(4)
    assert ours() == []


def test_verification_and_calibration_use_such_pools(starts, v3_artifact, v3_source, tmp_path, write, monkeypatch):
    starts(3, refuses)
    with pytest.raises(ConversionError, match="starts only"):
        verify(v3_artifact, workers=5)
    monkeypatch.undo()
    source = write(tmp_path / "source")
    add_tokenizer(source)
    (tmp_path / "text.txt").write_text(text(500))
    starts(2, refuses)
    with pytest.raises(ConversionError, match="starts only"):
        calibration = CalibrationText(tmp_path / "text.txt", 4, 16)
        convert_checkpoint(source, tmp_path / "out", method="gptq", calibration=calibration, workers=5)
    assert ours() == []


def test_signals_wait_and_then_act():
    seen = []
    previous = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with held_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            assert seen == []
        assert seen == [signal.SIGTERM]
        with pytest.raises(ValueError, match="ours"), held_signals():
            raise ValueError("ours")
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM] * 2
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_signals_that_are_ignored_stay_ignored():
    """As under nohup."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with held_signals():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_other_threads_hold_no_signals():
    problems = []

    def work():
        try:
            start_all([threading.Thread(target=lambda: None)])
        except BaseException as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []


LIMITED = """
import resource, threading
from npuq.parallel.pool import Pool
from npuq.errors import ConversionError
threading.stack_size(256 << 20)
held = int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmSize"))) * 1024
resource.setrlimit(resource.RLIMIT_AS, (held + (4 << 30), held + (4 << 30)))
try:
    Pool(500)
except ConversionError as error:
    print(error, threading.active_count())
"""


def test_what_the_system_itself_refuses() -> None:
    """Stacks of 256 MB in four GB: the 16th does not start, and the others end."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("the system starts only 1") and done.stdout.endswith(" 1\n")
