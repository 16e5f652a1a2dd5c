"""A hub that lies in its other answers, revisions that are none, and a folder with links that lead out of it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from audit import watched
from hostile import MARK, Entry, changed, hashes, place, run_all
from loopback import LoopbackHub
from support import MANIFEST, REPO, entry_of

import npuq
from npuq.errors import NpuqError
from npuq.hub import open_remote, resolve


@pytest.mark.parametrize("number", range(len(hashes(Path()))))
def test_commits(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, number: int
) -> None:
    """Which commit a branch is at, or a commit made: it becomes a folder's name, and what refs/ holds."""
    value = hashes(victim)[number]
    hub.say = changed(r"/revision/|/models/[^/]+/[^/]+$", lambda answer: {**answer, "sha": value})
    run_all(entries, tmp_path, victim)
    hub.say = changed("/commit/", lambda answer: {**answer, "commitOid": value})
    hub.state.put(REPO, {"config.json": b'{"a": 1}'})
    run_all({"push": entries["push"]}, tmp_path, victim)


@pytest.mark.parametrize("answer", [None, [], "x", 7, {"sha": None}, {"num": "../x", "name": ["x"]}])
def test_answers_that_make_no_sense(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path, answer: object
) -> None:
    """To every question but for content, one route at a time."""
    for route in (
        "whoami",
        "repos/create",
        "/revision/",
        "/refs",
        "/branch/",
        "/tag/",
        "discussions",
        "preupload",
        "batch",
        "/commit/",
    ):
        hub.state.put(REPO, {"config.json": b'{"a": 1}'})
        hub.say = changed(route, lambda right: answer)
        pushes = {name: run for name, run in entries.items() if "push" in name}
        run_all(pushes, tmp_path, victim)


@pytest.mark.parametrize(
    "revision", ["../x", "/x", "a/../../x", "", ".", "x.lock", "a b", "\x1b", "x\0", "a//b", "-x", "@{1}"]
)
def test_revisions(hub: LoopbackHub, there: object, tmp_path: Path, victim: Path, revision: str) -> None:
    """From the user, or from who wrote a script for him."""
    runs: dict[str, Entry] = {
        "pull": lambda target: npuq.pull(REPO, revision=revision),
        "resolve": lambda target: resolve(REPO, revision=revision),
        "stream": lambda target: open_remote(REPO, target, revision=revision),
        "push": lambda target: npuq.push(tmp_path, REPO, revision=revision),
    }
    run_all(runs, tmp_path, victim)
    with pytest.raises(NpuqError, match="is not a branch, tag or commit"):
        npuq.pull(REPO, revision=revision)
    assert not hub.log


class TestFolder:
    """A folder that was filled by somebody else, with a manifest: git clones bring links."""

    @pytest.mark.parametrize("link", ["npuq", "model-1.safetensors.npuq-part", "sub", "npuq/manifest.npuq-part"])
    def test_links_out_of_it(
        self, hub: LoopbackHub, there: dict[str, bytes], small: Path, tmp_path: Path, victim: Path, link: str
    ) -> None:
        manifest = json.loads(there[MANIFEST])
        manifest["files"]["sub/x"] = entry_of(b"x")
        place(hub, MANIFEST, json.dumps(manifest), {"sub/x": b"x"})
        target = tmp_path / "there"
        (target / "npuq").mkdir(parents=True)
        inside = victim / MARK
        if link in ("npuq", "sub"):
            inside.mkdir()
        else:
            inside.write_bytes(b"mine")
        if link == "npuq":
            (target / "npuq").rmdir()
        (target / link).symlink_to(inside)
        with watched() as watch, suppress(NpuqError):
            npuq.pull(REPO, target)
        assert not watch.outside(tmp_path)
        assert [path.name for path in victim.rglob("*")] == [MARK]
        assert inside.is_dir() or inside.read_bytes() == b"mine"
