"""A hub that lies, a repository made to harm: whatever a listing says, whoever asks for it.

Every outcome is success or one line without control characters. Nothing is written outside the cache and the directory
that was named, and nothing whose name came from there is opened outside either: an audit hook sees every path.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile import SIZES, Entry, changed, hashes, paths, put, run_all, with_end
from loopback import LoopbackHub
from support import MANIFEST, REPO

import npuq
from npuq.errors import NpuqError


def test_an_honest_hub(
    hub: LoopbackHub, there: object, entries: dict[str, Entry], tmp_path: Path, victim: Path
) -> None:
    """That the entry points get anywhere at all."""
    for name in ("pull", "pull to a folder", "resolve", "push", "push to a branch", "push while converting"):
        entries[name](tmp_path / name)
    assert (tmp_path / "pull to a folder" / MANIFEST).is_file()
    run_all(entries, tmp_path, victim)


class TestListing:
    """What the hub says of a repository's files: names come from whoever committed them."""

    @pytest.fixture(autouse=True)
    def as_checkpoint(self, request: pytest.FixtureRequest, hub: LoopbackHub, there: dict[str, bytes]) -> None:
        """With a manifest and without one, the small artifact being a checkpoint then."""
        if request.node.callspec.params.get("kind") == "checkpoint":
            files = dict(hub.state.repos[REPO].commit("main").files)
            del files[MANIFEST]
            hub.state.repos[REPO].add_commit("main", "no manifest", files)

    @pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
    @pytest.mark.parametrize("number", range(len(paths(Path()))))
    def test_names(
        self, hub: LoopbackHub, entries: dict[str, Entry], tmp_path: Path, victim: Path, kind: str, number: int
    ) -> None:
        value = paths(victim)[number]
        ends = ("", ".safetensors", ".json")
        hub.say = changed("/tree/", lambda page: [*page, *({**page[0], "path": with_end(value, end)} for end in ends)])
        run_all(entries, tmp_path, victim)

    @pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
    @pytest.mark.parametrize("place", ["oid", "lfs", "lfs.oid", "lfs.size", "size", "type"])
    def test_hashes_and_sizes(
        self, hub: LoopbackHub, entries: dict[str, Entry], tmp_path: Path, victim: Path, kind: str, place: str
    ) -> None:
        values = SIZES if "size" in place else hashes(victim)
        # The first names, sizes and hashes that are wrong in their own way; the rest are of the same kinds.
        for value in values if kind == "checkpoint" else values[:3]:
            hub.say = changed("/tree/", lambda page, value=value: [put(item, place, value) for item in page])
            run_all({name: entries[name] for name in ("pull", "resolve", "stream", "push")}, tmp_path, victim)

    @pytest.mark.parametrize("kind", ["artifact"])
    @pytest.mark.parametrize("page", [None, 7, "x", {}, [1], [[]], [None], [{"type": "file"}], [{}]])
    def test_no_listing(
        self, hub: LoopbackHub, entries: dict[str, Entry], tmp_path: Path, victim: Path, kind: str, page: object
    ) -> None:
        hub.say = changed("/tree/", lambda right: page)
        run_all(entries, tmp_path, victim)

    @pytest.mark.parametrize("kind", ["artifact"])
    def test_a_name_twice(self, hub: LoopbackHub, kind: str) -> None:
        hub.say = changed("/tree/", lambda page: [*page, page[0]])
        with pytest.raises(NpuqError, match="twice"):
            npuq.pull(REPO)
