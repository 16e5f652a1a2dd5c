"""Shards are pushed as they are finished, while later ones are made."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

from loopback import LoopbackHub
from streaming import SOURCE, without_manifest
from support import MANIFEST, REPO, assert_pushed, kill_when, npuq_process, npuq_run


class TestPushWhileConverting:
    ARGUMENTS = ("--method", "minmax", "--max-shard-size", "2MB", "--download-window", "2500kB", "--quiet")

    def test_from_hub_to_hub(self, hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path) -> None:
        done = npuq_run("convert", SOURCE, tmp_path / "out", *self.ARGUMENTS, "--push", REPO, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["push"]["repo"] == REPO
        assert_pushed(hub, tmp_path / "out")
        assert without_manifest(tmp_path / "out") == expected
        added = [set(commit.files) for commit in hub.state.repos[REPO].commits]
        order = [name for before, after in itertools.pairwise(added) for name in after - before if "model-0" in name]
        assert order == sorted(order)
        assert len(added) > 10  # shards came one by one

    def test_killed_and_run_again(
        self, hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        arguments = ("convert", SOURCE, tmp_path / "out", *self.ARGUMENTS, "--push", REPO)
        assert kill_when(npuq_process(*arguments), lambda: len(hub.requests("^PUT /lfs/")) >= 3)
        assert MANIFEST not in hub.state.files(REPO)
        done = npuq_run(*arguments)
        assert done.returncode == 0, done.stderr
        assert_pushed(hub, tmp_path / "out")
        assert without_manifest(tmp_path / "out") == expected
        shards = sum(len(content) for name, content in expected.items() if name.endswith(".safetensors"))
        assert hub.uploaded_bytes() <= shards + 2 * 2_100_000

    def test_a_repository_that_may_not_be_written_to(self, hub: LoopbackHub, source: str, tmp_path: Path) -> None:
        done = npuq_run("convert", SOURCE, tmp_path / "out", *self.ARGUMENTS, "--push", "bob/his")
        assert done.returncode == 1
        assert "may not write to bob/his" in done.stderr
        assert not (tmp_path / "out").exists()

    def test_foreign_weights_are_named_with_their_repository(
        self, hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path
    ) -> None:
        hub.state.put(REPO, {"adapter.safetensors": b"theirs"})
        arguments = [argument for argument in self.ARGUMENTS if argument != "--quiet"]
        done = npuq_run("convert", SOURCE, tmp_path / "out", *arguments, "--push", REPO)
        assert done.returncode == 1
        message = f"{REPO} holds adapter.safetensors, which is not part of this artifact"
        assert re.search(rf"^model-00001-of-\d+\.safetensors was not pushed yet: {message}", done.stderr, re.MULTILINE)
        assert re.search(f"^npuq: error: {message}", done.stderr, re.MULTILINE)
        assert set(hub.state.files(REPO)) == {"adapter.safetensors", ".gitattributes"}
        assert without_manifest(tmp_path / "out") == expected  # the conversion itself is finished
