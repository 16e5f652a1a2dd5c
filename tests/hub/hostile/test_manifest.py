"""Files of a repository that npuq reads, made to harm: manifest, index, the note on an unfinished push."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hostile import BIG, MARK, SIZES, Entry, hashes, paths, place, run_all
from loopback import LoopbackHub
from support import MANIFEST, REPO, entry_of

import npuq
from npuq.errors import NpuqError


@pytest.mark.parametrize("number", range(len(paths(Path()))))
def test_names_in_a_manifest(
    hub: LoopbackHub, there: dict[str, bytes], entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    value, manifest = paths(victim)[number], json.loads(there[MANIFEST])
    manifest["files"][value if isinstance(value, str) else MARK] = {"size": 1, "sha256": "0" * 64}
    place(hub, MANIFEST, json.dumps(manifest), {value: b"x"} if isinstance(value, str) else {})
    run_all(entries, tmp_path, victim)


def test_the_name_of_what_is_not_whole(hub: LoopbackHub, there: dict[str, bytes], tmp_path: Path) -> None:
    """It would be taken for the beginning of another file."""
    manifest = json.loads(there[MANIFEST])
    manifest["files"]["config.json.npuq-part"] = entry_of(b"x")
    place(hub, MANIFEST, json.dumps(manifest), {"config.json.npuq-part": b"x"})
    with pytest.raises(NpuqError, match="is a name of npuq's own"):
        npuq.pull(REPO, tmp_path / "there")


@pytest.mark.parametrize("key", ["sha256", "size"])
def test_hashes_and_sizes_in_a_manifest(
    hub: LoopbackHub, there: dict[str, bytes], entries: dict[str, Entry], tmp_path: Path, victim: Path, key: str
) -> None:
    readers = {name: entries[name] for name in ("pull", "pull to a folder", "resolve", "push")}
    for value in hashes(victim) if key == "sha256" else SIZES:
        manifest = json.loads(there[MANIFEST])
        # What any owner of a repository can put there: an ordinary file, of any size.
        manifest["files"]["big.bin"] = {**entry_of(BIG), key: value}
        place(hub, MANIFEST, json.dumps(manifest), {"big.bin": BIG})
        run_all(readers, tmp_path, victim)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"7", b'{"format_version": 1}', b"[" * 100_000, b'{"a": ' * 100_000, b"\xff\xfe", b"{}",
     b'{"format_version": 1, "files": []}', b'{"format_version": 1, "files": {"a": 1}}',
     b'{"format_version": NaN, "files": {}}', b'{"format_version": "\\u001b[31m", "files": {}}',
     b'{"format_version": 1, "files": {"a": {"size": 1' + b"0" * 5000 + b"}}}"],
)  # fmt: skip
def test_no_manifest(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, content: bytes
) -> None:
    for name in (MANIFEST, "npuq/unfinished.json"):
        hub.state.put(REPO, {name: content})
        run_all(entries, tmp_path, victim)


@pytest.mark.parametrize("number", range(len(paths(Path()))))
def test_names_in_an_index(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    value = paths(victim)[number]
    files = dict(hub.state.repos[REPO].commit("main").files)
    del files[MANIFEST]
    hub.state.repos[REPO].add_commit("main", "no manifest", files)
    index = json.dumps({"weight_map": {"t1": value, "t2": "model-2.safetensors"}})
    place(hub, "model.safetensors.index.json", index, {value: b"x"} if isinstance(value, str) else {})
    readers = ("resolve", "stream", "npuq verify", "npuq convert", "npuq generate")
    run_all({name: entries[name] for name in readers}, tmp_path, victim)


@pytest.mark.parametrize("number", range(len(paths(Path()))))
def test_names_in_the_note_on_an_unfinished_push(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    value = paths(victim)[number]
    place(hub, "npuq/unfinished.json", json.dumps({"replaces": [value]}), {})
    run_all({name: run for name, run in entries.items() if "push" in name or name == "pull"}, tmp_path, victim)
