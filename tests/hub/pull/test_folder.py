"""Pull into a folder of the user's own: claimed, filled, followed, and never a mixture of two artifacts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from faults import Fault
from huggingface_hub import constants
from loopback import LoopbackHub
from support import (
    CARD,
    MANIFEST,
    REPO,
    alter,
    contents,
    files_of,
    reseal,
    shards,
)

import npuq
from npuq.errors import HubError

SHARD = "model-00002-of"


class TestFolder:
    def test_pull(self, hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
        there = npuq.pull(REPO, tmp_path / "there")
        assert contents(there) == contents(pushed)
        assert not list(there.rglob("*.npuq-part"))
        verdict = npuq.verify(there)
        assert verdict.ok, verdict.problems

    def test_what_is_there_stays_and_is_not_fetched(self, hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
        there = npuq.pull(REPO, tmp_path / "there")
        (there / MANIFEST).unlink()
        alter(shards(there)[0])
        hub.log.clear()
        npuq.pull(REPO, there)
        assert len(hub.requests(r"^GET .*\.safetensors")) == 1
        assert contents(there) == contents(pushed)

    def test_the_cache_stays_as_it_is(
        self, hub: LoopbackHub, pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What it has of an older revision is still found without the hub."""
        npuq.pull(REPO, tmp_path / "first")
        assert not files_of(tmp_path / "hf-home")
        old = npuq.pull(REPO)
        before = files_of(tmp_path / "hf-home")
        alter(shards(pushed)[0])
        reseal(pushed)
        hub.state.put(REPO, files_of(pushed))
        npuq.pull(REPO, tmp_path / "second")
        assert files_of(tmp_path / "hf-home") == before
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert npuq.pull(REPO) == old

    @pytest.fixture
    def interrupted(self, hub: LoopbackHub, pushed: Path, tmp_path: Path) -> Path:
        """A folder that misses the first shard of the artifact that was pulled into it."""
        hub.faults.add(Fault(f"resolve/.*{shards(pushed)[0].name}", status=410, times=10**6))
        with pytest.raises(HubError, match="status 410"):
            npuq.pull(REPO, tmp_path / "there")
        hub.faults.clear()
        assert len(shards(tmp_path / "there")) == len(shards(pushed)) - 1
        return tmp_path / "there"

    def test_no_other_artifact_is_mixed_into_an_interrupted_pull(
        self, hub: LoopbackHub, pushed: Path, interrupted: Path
    ) -> None:
        hub.state.put("alice/other", files_of(pushed))
        hub.state.repos[REPO].branches["other"] = hub.state.repos[REPO].branches["main"]
        before = files_of(interrupted)
        for repo, revision in (("alice/other", None), (REPO, "other")):
            with pytest.raises(HubError, match="holds a part of another artifact, or of another revision"):
                npuq.pull(repo, interrupted, revision=revision)
        assert files_of(interrupted) == before
        assert contents(npuq.pull(REPO, interrupted)) == contents(pushed)
        assert set(files_of(interrupted)) == {*contents(pushed), CARD}

    def test_an_interrupted_pull_follows_its_branch(
        self, hub: LoopbackHub, pushed: Path, interrupted: Path, example_fp8: Path, tmp_path: Path
    ) -> None:
        (interrupted / f"{shards(pushed)[0].name}.npuq-part").write_bytes(b"a beginning")
        other = tmp_path / "other"
        npuq.convert_checkpoint(example_fp8, other, method="minmax")
        files = dict(hub.state.repos[REPO].commit("main").files)
        hub.state.repos[REPO].add_commit("main", "none", {".gitattributes": files[".gitattributes"]})
        hub.state.put(REPO, files_of(other))
        # Interrupted again: what the first one left is not forgotten.
        hub.faults.add(Fault(r"resolve/.*\.safetensors", status=410))
        with pytest.raises(HubError, match="status 410"):
            npuq.pull(REPO, interrupted)
        assert contents(npuq.pull(REPO, interrupted)) == contents(other)
        assert set(files_of(interrupted)) == {*contents(other), CARD}

    def test_weights_that_nobody_knows_are_refused(self, hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
        (tmp_path / "there" / "npuq").mkdir(parents=True)
        (tmp_path / "there" / "other.safetensors").write_bytes(b"")
        with pytest.raises(HubError, match=r"other\.safetensors: is not of this artifact"):
            npuq.pull(REPO, tmp_path / "there")

    @pytest.mark.parametrize("left", [b"stale", b"s" * 10**7], ids=["shorter", "longer"])
    def test_a_stale_part_is_no_try(self, hub: LoopbackHub, pushed: Path, tmp_path: Path, left: bytes) -> None:
        (tmp_path / "there" / "npuq").mkdir(parents=True)
        (tmp_path / "there" / f"{shards(pushed)[0].name}.npuq-part").write_bytes(left)
        # Once on the way, after what was left turned out wrong.
        hub.faults.add(Fault(f"^GET .*{shards(pushed)[0].name}", after=left == b"stale", corrupt=1000))
        assert contents(npuq.pull(REPO, tmp_path / "there")) == contents(pushed)

    @pytest.mark.parametrize("found", ["file", "foreign", "another"])
    def test_refused(self, hub: LoopbackHub, pushed: Path, tmp_path: Path, found: str) -> None:
        there = tmp_path / "there"
        if found == "file":
            there.write_text("")
        elif found == "foreign":
            there.mkdir()
            (there / "model.safetensors").write_text("theirs")
        else:
            shutil.copytree(pushed, there)
            alter(shards(there)[0])
            reseal(there)
        with pytest.raises(HubError, match="choose another"):
            npuq.pull(REPO, there)
        assert not hub.requests(r"^GET .*\.safetensors")
