"""What the tests of this folder share: damage to artifacts, comparisons, and runs that are killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from huggingface_hub import constants
from loopback import LoopbackHub

REPO = "alice/tiny-w4a8"
# Artifacts to push: of the shipped checkpoint, and of a release in FP4 with tables and an MTP layer.
EXAMPLE, DEEPSEEK_V4 = "example", "deepseek-v4"
MANIFEST = "npuq/manifest.json"
CARD = "README.md"


def shards(artifact: Path) -> list[Path]:
    return sorted(artifact.glob("model-*.safetensors"))


def alter(path: Path) -> None:
    """Change one byte in the data of a shard."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def reseal(artifact: Path) -> None:
    """Make the manifest say what the files now are."""
    manifest = json.loads((artifact / MANIFEST).read_text())
    for name, entry in manifest["files"].items():
        entry.update(entry_of((artifact / name).read_bytes()))
    (artifact / MANIFEST).write_text(json.dumps(manifest))


def files_of(directory: Path) -> dict[str, bytes]:
    """All files below a directory, by their relative names."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def entry_of(content: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def contents(directory: Path) -> dict[str, bytes]:
    """The files that the manifest vouches for, and the manifest."""
    names = [*json.loads((directory / MANIFEST).read_text())["files"], MANIFEST]
    return {name: (directory / name).read_bytes() for name in names}


def assert_pushed(hub: LoopbackHub, artifact: Path, revision: str = "main") -> None:
    """The hub holds the artifact: every file, no leftover, finished."""
    there = hub.state.files(REPO, revision)
    assert set(there) == {*contents(artifact), CARD, ".gitattributes"}
    for name, content in contents(artifact).items():
        assert there[name] == content, name


def npuq_process(*arguments: str | Path) -> subprocess.Popen[str]:
    """`npuq …` in a process of its own, under this test's environment, to be killed or interrupted."""
    command = [sys.executable, "-m", "npuq", *map(str, arguments)]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def npuq_run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `npuq …` to its end, in a process of its own under this test's environment."""
    return warm.run(*map(str, arguments))


def kill_when(process: subprocess.Popen[str], condition: object, limit: float = 60.0) -> bool:
    """SIGKILL the process as soon as `condition()` holds; False when it ended before."""
    deadline = time.monotonic() + limit
    while process.poll() is None and time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.001)
    process.communicate()
    return False


def as_modelslim(artifact: Path, directory: Path) -> Path:
    """An artifact under the names that ModelSlim gives its files, without what it does not write."""
    directory.mkdir()
    for path in artifact.iterdir():
        if path.is_file() and path.name != CARD:
            name = path.name.replace("model-0", "quant_model_weights-0")
            name = name.replace("model.safe", "quant_model_weights.safe")
            content = path.read_bytes()
            if name.endswith("index.json"):
                content = content.replace(b"model-0", b"quant_model_weights-0")
            (directory / name).write_bytes(content)
    return directory


def use_cache(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Make this process and those it starts use another Hugging Face home."""
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
