"""All that reads a repository, and a small artifact that passes for one where nobody loads it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hostile import HERE, QUICK, Entry, command
from loopback import LoopbackHub
from support import MANIFEST, REPO, entry_of, files_of, use_cache

import npuq
from npuq.hub import ShardPusher, open_remote, resolve


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What passes for an artifact where nobody loads it: manifest, config, index, two shards."""
    folder = tmp_path_factory.mktemp("small")
    header = json.dumps({"t": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    for number in (1, 2):
        named = header.replace(b'"t"', b'"t%d"' % number)
        (folder / f"model-{number}.safetensors").write_bytes(struct.pack("<Q", len(named)) + named + bytes(8))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    index = {"weight_map": {f"t{number}": f"model-{number}.safetensors" for number in (1, 2)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "README.md").write_text("# Small\n")
    (folder / "npuq").mkdir()
    names = [path.name for path in folder.iterdir() if path.is_file() and path.name != "README.md"]
    (folder / MANIFEST).write_text(
        json.dumps({"format_version": 1, "files": {name: entry_of((folder / name).read_bytes()) for name in names}})
    )
    return folder


@pytest.fixture
def victim(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of the user's that no command has anything to do with."""
    return tmp_path_factory.mktemp("victim")


@pytest.fixture
def entries(
    hub: LoopbackHub, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> dict[str, Entry]:
    """All that reads a repository, each with a cache of its own."""

    def fresh(run: Entry) -> Entry:
        def with_cache(target: Path) -> None:
            use_cache(monkeypatch, target.with_suffix(".home"))
            run(target)

        return with_cache

    def stream(target: Path) -> None:
        with open_remote(REPO, target, backoff=QUICK) as checkpoint:
            checkpoint.window.start([(name,) for name in checkpoint.tensors], ())
            for name in checkpoint.tensors:
                checkpoint.read(name)
                checkpoint.window.release((name,))

    def push_shards(target: Path) -> None:
        pusher = ShardPusher(small, REPO, backoff=QUICK)
        pusher.add("model-1.safetensors", entry_of((small / "model-1.safetensors").read_bytes())["sha256"])
        pusher.finish()

    def called(*arguments: object) -> Entry:
        return lambda target: command(
            capsys, monkeypatch, *(target if argument is HERE else argument for argument in arguments)
        )

    found: dict[str, Entry] = {
        "pull": lambda target: npuq.pull(REPO, backoff=QUICK),
        "pull to a folder": lambda target: npuq.pull(REPO, target, backoff=QUICK),
        "resolve": lambda target: resolve(REPO),
        "resolve a revision": lambda target: resolve(f"{REPO}@v1/x"),
        "stream": stream,
        "push": lambda target: npuq.push(small, REPO, tag="v1", backoff=QUICK),
        "push to a branch": lambda target: npuq.push(small, REPO, revision="w4a8", backoff=QUICK),
        "push as a pull request": lambda target: npuq.push(small, REPO, create_pr=True, backoff=QUICK),
        "push while converting": push_shards,
        "npuq pull": called("pull", REPO),
        "npuq verify": called("verify", REPO),
        "npuq inspect": called("inspect", REPO),
        "npuq generate": called("generate", REPO, "--prompt", "a"),
        "npuq convert": called("convert", REPO, HERE, "--dry-run"),
        "npuq push": called("push", small, REPO, "--no-verify"),
    }
    return {name: fresh(run) for name, run in found.items()}


@pytest.fixture
def there(hub: LoopbackHub, small: Path) -> dict[str, bytes]:
    """The small artifact, on the hub; returns its files."""
    files = files_of(small)
    hub.state.put(REPO, files)
    return files
