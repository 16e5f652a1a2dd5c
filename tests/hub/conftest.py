"""A loopback hub at HF_ENDPOINT, a fresh cache for every test, and one small artifact to push."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import npuq
from npuq.hub.transfer.retry import Backoff

sys.path.insert(0, str(Path(__file__).parent / "rig"))
sys.path.insert(1, str(Path(__file__).parent.parent / "cli"))  # for warm.py
from faults import Fault
from loopback import LoopbackHub, honest
from loopback_modelscope import WRITER as SCOPE_WRITER
from loopback_modelscope import LoopbackModelScope
from loopback_state import WRITER, State
from loopback_xet import XetStore
from packed_v4 import write_random_release
from support import DEEPSEEK_V4, EXAMPLE, REPO, files_of, use_cache


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    port = int(os.environ["HF_ENDPOINT"].rpartition(":")[2])
    server = LoopbackHub(tmp_path_factory.mktemp("hub"), port).start()
    yield server
    server.stop()


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoopbackHub:
    """An empty hub with Xet, as huggingface.co is, an empty cache, the writer's token in HF_TOKEN, and short waits
    between retries. The client is as it comes."""
    folder = tmp_path / "hub-objects"
    folder.mkdir()
    server.state = State(folder)
    server.xet = XetStore(tmp_path / "hub-xet")
    server.say = honest
    server.faults.clear()
    server.log.clear()
    server.multipart_from = 1 << 62
    use_cache(monkeypatch, tmp_path / "hf-home")
    monkeypatch.setenv("HF_TOKEN", WRITER)
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
    return server


@pytest.fixture(scope="session")
def made_artifact(request: pytest.FixtureRequest, example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, or the one that a test asks for, as W4A8, in shards of 2 MB at most. Do not change it:
    `artifact` is a copy."""
    folder = tmp_path_factory.mktemp("made")
    source, largest = example_fp8, 2_000_000
    if getattr(request, "param", EXAMPLE) == DEEPSEEK_V4:
        source, largest = folder / "source", 400_000
        write_random_release(source)
    npuq.convert_checkpoint(source, folder / "artifact", method="minmax", max_shard_size=largest)
    return folder / "artifact"


@pytest.fixture
def artifact(made_artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made_artifact, tmp_path / "artifact"))


@pytest.fixture
def pushed(hub: LoopbackHub, artifact: Path) -> Path:
    """The artifact, which the hub has too."""
    hub.state.put(REPO, files_of(artifact))
    return artifact


@pytest.fixture
def scope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackModelScope]:
    """An empty ModelScope, an empty cache, the writer's token, and short waits between retries."""
    server = LoopbackModelScope()
    settings = {"ENDPOINT": server.endpoint, "API_TOKEN": SCOPE_WRITER, "HOME": tmp_path / "ms-home"}
    for name, value in {**settings, "CACHE": tmp_path / "ms-cache"}.items():
        monkeypatch.setenv(f"MODELSCOPE_{name}", str(value))
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.02)))
    yield server
    server.stop()


@pytest.fixture
def backoff() -> Backoff:
    return Backoff(attempts=4, first_seconds=0.01, most_seconds=0.02)


__all__ = ["Fault"]
