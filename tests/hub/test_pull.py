"""Pull against the loopback hub: resumed inside files, checked by hash, offline, into the cache or a folder."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from faults import Fault
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from loopback import LoopbackHub
from support import (
    CARD,
    MANIFEST,
    REPO,
    alter,
    as_modelslim,
    contents,
    files_of,
    kill_when,
    npuq_process,
    npuq_run,
    reseal,
    shards,
    use_cache,
)

import npuq
from npuq.errors import HubError, NpuqError
from npuq.hub import resolve
from npuq.hub.transfer.retry import Backoff

SHARD = "model-00002-of"


FAULTS = {
    "500 on the branch": Fault("/revision/main", status=500),
    "500 on the manifest": Fault(f"resolve/.*{MANIFEST}", status=500),
    "reset on the manifest": Fault(f"resolve/.*{MANIFEST}", reset_before=True),
    "500 on the tree": Fault("/tree/", status=500),
    "503 on a small file": Fault(r"^GET .*tokenizer\.json", status=503),
    "503 on a file": Fault(f"^GET .*{SHARD}", status=503, times=2),
    "reset before a file": Fault(f"^GET .*{SHARD}", reset_before=True),
    "reset amid a file, twice": Fault(f"^GET .*{SHARD}", reset_after=400_000, times=2),
    "reset amid a small file": Fault(r"^GET .*tokenizer\.json", reset_after=1000),
    "a file cut short": Fault(f"^GET .*{SHARD}", truncate=5000),
    "a bit flipped on the way": Fault(f"^GET .*{SHARD}", corrupt=1_000_000),
    "429": Fault(f"^GET .*{SHARD}", status=429),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_survived(hub: LoopbackHub, pushed: Path, backoff: Backoff, fault: Fault) -> None:
    hub.faults.add(fault)
    pulled = npuq.pull(REPO, backoff=backoff)
    assert hub.faults.hits == fault.times
    assert contents(pulled) == contents(pushed)


def test_a_reset_goes_on_inside_the_file(hub: LoopbackHub, pushed: Path, backoff: Backoff) -> None:
    hub.faults.add(Fault(f"^GET .*{SHARD}", reset_after=600_000))
    npuq.pull(REPO, backoff=backoff)
    sent = hub.requests(f"^GET .*{SHARD}")
    starts = [int(re.match(r"bytes=(\d+)-", seen.range or "")[1]) for seen in sent]  # type: ignore[index]
    assert starts[0] == 0
    assert 0 < starts[1] <= 600_000


def test_a_kill_goes_on_inside_the_file(hub: LoopbackHub, pushed: Path) -> None:
    shard = shards(pushed)[1]
    hub.faults.add(Fault(f"^GET .*{shard.name}", bytes_per_second=2_000_000, times=1))
    process = npuq_process("pull", REPO, pushed.parent / "there", "--quiet")
    assert kill_when(process, lambda: sum(seen.sent for seen in hub.requests(f"^GET .*{shard.name}")) > 500_000)
    hub.log.clear()
    pulled = npuq.pull(REPO, pushed.parent / "there")
    (again,) = hub.requests(f"^GET .*{shard.name}")
    assert again.sent < shard.stat().st_size - 100_000
    assert contents(pulled) == contents(pushed)


def test_second_pull_asks_for_the_commit_alone(hub: LoopbackHub, pushed: Path) -> None:
    npuq.pull(REPO)
    hub.log.clear()
    npuq.pull(REPO)
    assert [seen.request for seen in hub.log] == [f"GET /api/models/{REPO}/revision/main"]


def test_offline(hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = npuq.pull(REPO)
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert npuq.pull(REPO) == pulled
    with pytest.raises(HubError, match="not in the local cache"):
        npuq.pull("alice/another")
    damaged = shards(pulled)[0].resolve()
    damaged.unlink()
    with pytest.raises(HubError, match="the hub cannot be asked"):
        npuq.pull(REPO)
    assert not hub.log


def test_a_cache_that_may_not_be_written(hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that several users share: what is there is used."""
    pulled = npuq.pull(REPO)

    def refused(path: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    for name in ("write_text", "mkdir", "symlink_to", "replace"):
        monkeypatch.setattr(Path, name, refused)
    assert npuq.pull(REPO) == pulled
    hub.state.repos[REPO].branches["other"] = hub.state.repos[REPO].branches["main"]
    assert npuq.pull(REPO, revision="other") == pulled
    (pulled / "config.json").unlink()
    with pytest.raises(HubError, match="Permission denied"):
        npuq.pull(REPO)


def test_the_hub_is_unreachable(hub: LoopbackHub, pushed: Path, backoff: Backoff) -> None:
    pulled = npuq.pull(REPO)
    hub.faults.add(Fault("", reset_before=True, times=10**6))
    assert npuq.pull(REPO, backoff=backoff) == pulled
    with pytest.raises(HubError, match=r"the connection to .* failed .*it continues"):
        npuq.pull("alice/another", backoff=backoff)


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_without_a_network_nobody_waits(
    hub: LoopbackHub, pushed: Path, example_fp8: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Two requests, one short wait: whatever is there, and whatever is missing."""
    if kind == "checkpoint":
        hub.state.put("alice/source", files_of(example_fp8))
    repo = "alice/source" if kind == "checkpoint" else REPO
    fetched = resolve(repo)
    hub.faults.add(Fault("", reset_before=True, times=10**6))
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for missing in (False, True):
        hub.log.clear()
        waits.clear()
        if missing:
            (fetched / "config.json").unlink()
            with pytest.raises(HubError, match=r"the connection to .* failed"):
                resolve(repo)
        else:
            assert resolve(repo) == fetched
        assert len(hub.log) == 2
        assert len(waits) == 1 and waits[0] < 2


def test_connecting_has_a_limit_of_its_own(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that drops every packet is known after ten seconds, not after a minute."""
    seen: list[dict[str, float]] = []
    session = get_session()
    send = session.send

    def noted(request: Any, **options: Any) -> Any:
        seen.append(request.extensions["timeout"])
        return send(request, **options)

    monkeypatch.setattr(session, "send", noted)
    hub.state.put(REPO, {"config.json": b"{}"})
    with pytest.raises(HubError, match="not an artifact"):
        npuq.pull(REPO)
    assert len(seen) == 2
    assert all(timeout["connect"] == constants.HF_HUB_ETAG_TIMEOUT < timeout["read"] for timeout in seen)


def test_content_that_is_not_the_manifests_is_refused(hub: LoopbackHub, pushed: Path) -> None:
    hub.state.put(REPO, {shards(pushed)[1].name: b"something else"})
    with pytest.raises(HubError, match=rf"{SHARD}-00013\.safetensors is not what .* \(its size differs\)"):
        npuq.pull(REPO)
    assert not hub.requests(f"^GET .*{SHARD}")  # known from the listing, before any of it was fetched
    small = {**contents(pushed), "config.json": contents(pushed)["config.json"].replace(b"1", b"2", 1)}
    hub.state.put(REPO, small)
    with pytest.raises(HubError, match=r"config\.json is not what .* \(its hash differs\)"):
        npuq.pull(REPO)


def test_a_hub_that_keeps_sending_wrong_bytes(hub: LoopbackHub, pushed: Path, backoff: Backoff) -> None:
    hub.faults.add(Fault(f"^GET .*{SHARD}", corrupt=1000, times=10**6))
    with pytest.raises(HubError, match="is not what the manifest promises"):
        npuq.pull(REPO, backoff=backoff)
    assert len(hub.requests(f"^GET .*{SHARD}")) == 2
    hub.faults.clear()
    assert contents(npuq.pull(REPO)) == contents(pushed)


def test_a_damaged_cached_file_is_fetched_again(hub: LoopbackHub, pushed: Path) -> None:
    pulled = npuq.pull(REPO)
    hub.log.clear()
    alter(shards(pulled)[3].resolve())
    config = (pulled / "config.json").resolve()
    config.write_bytes(config.read_bytes().replace(b"1", b"2", 1))
    assert contents(npuq.pull(REPO)) == contents(pushed)
    fetched = {seen.request.rpartition("/")[2] for seen in hub.requests("^GET .*resolve")}
    assert fetched == {shards(pulled)[3].name, "config.json"}


def test_disk_full(hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sha256 = os.fsync, json.loads((pushed / MANIFEST).read_text())["files"][shards(pushed)[1].name]["sha256"]

    def full(descriptor: int) -> None:
        if sha256 in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HubError, match=f"{SHARD}.*no space left on the disk; make room and run the same command again"):
        npuq.pull(REPO)
    monkeypatch.setattr(os, "fsync", synced)
    hub.log.clear()
    assert contents(npuq.pull(REPO)) == contents(pushed)
    assert not hub.requests(r"^GET .*\.safetensors")  # all had come through


class TestBeforeWeights:
    """What speaks against a model is said before hours of fetching: everything small comes first."""

    class RefusedError(NpuqError):
        pass

    @pytest.mark.parametrize("kind", ["artifact", "artifact into a folder", "checkpoint"])
    def test_no_weight_is_fetched(self, hub: LoopbackHub, pushed: Path, tmp_path: Path, kind: str) -> None:
        if kind == "checkpoint":
            files = dict(hub.state.repos[REPO].commit("main").files)
            del files[MANIFEST]
            hub.state.repos[REPO].add_commit("main", "no manifest", files)
        seen: list[set[str]] = []

        def refuse(directory: Path) -> None:
            seen.append({path.name for path in directory.iterdir()})
            raise self.RefusedError("no tokenizer")

        fetch = partial(npuq.pull, REPO, tmp_path / "there") if "folder" in kind else partial(resolve, REPO)
        with pytest.raises(self.RefusedError):
            fetch(before_weights=refuse)
        assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= seen[0]
        assert not any(name.endswith(".safetensors") for name in seen[0])
        assert not hub.requests(r"^GET .*model-.*\.safetensors")
        fetch(before_weights=lambda directory: None)
        assert len(hub.requests(r"^GET .*model-.*\.safetensors")) == len(shards(pushed))

    def test_a_model_without_a_tokenizer(self, hub: LoopbackHub, pushed: Path, eval_text: Path) -> None:
        files = dict(hub.state.repos[REPO].commit("main").files)
        for name in (MANIFEST, "tokenizer.json"):
            del files[name]
        hub.state.repos[REPO].add_commit("main", "no tokenizer", files)
        for command in (("generate", REPO, "--prompt", "a"), ("evaluate", REPO, "--text", eval_text)):
            done = npuq_run(*command)
            assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "tokenizer" in done.stderr
        assert not hub.requests(r"^GET .*\.safetensors$")


class TestFolder:
    def test_pull(self, hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
        there = npuq.pull(REPO, tmp_path / "there")
        assert contents(there) == contents(pushed)
        assert not list(there.rglob("*.npuq-part"))
        report = npuq.verify(there)
        assert report.ok, report.problems

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


class TestRefused:
    def test_missing(self, hub: LoopbackHub) -> None:
        with pytest.raises(HubError, match="there is no repository alice/none, or this token may not see it"):
            npuq.pull("alice/none")

    def test_revision(self, hub: LoopbackHub, pushed: Path) -> None:
        with pytest.raises(HubError, match="has no such revision"):
            npuq.pull(REPO, revision="v9")

    def test_private(self, hub: LoopbackHub, pushed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.state.repos[REPO].private = True
        with pytest.raises(HubError, match="or this token may not see it"):
            npuq.pull(REPO, token="hf_other")
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(HubError, match="or this token may not see it"):
            npuq.pull(REPO)
        npuq.pull(REPO, token="hf_writer")

    def test_no_artifact(self, hub: LoopbackHub) -> None:
        hub.state.put(REPO, {"config.json": b"{}"})
        with pytest.raises(HubError, match="it is not an artifact of npuq's"):
            npuq.pull(REPO)

    @pytest.mark.parametrize("name", ["../x.safetensors", "/tmp/x", "a/../../x"])
    def test_a_name_outside(self, hub: LoopbackHub, pushed: Path, name: str) -> None:
        manifest = json.loads((pushed / MANIFEST).read_text())
        manifest["files"][name] = {"size": 1, "sha256": "0" * 64}
        hub.state.put(REPO, {MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(HubError, match=r"npuq/manifest\.json: .* is not a file name that may be used"):
            npuq.pull(REPO)

    @pytest.mark.parametrize("content", [b"", b"[]", b'{"format_version": 1}', b'{"format_version": 99, "files": {}}'])
    def test_no_manifest(self, hub: LoopbackHub, pushed: Path, content: bytes) -> None:
        hub.state.put(REPO, {MANIFEST: content})
        with pytest.raises(HubError, match=f"{REPO}: "):
            npuq.pull(REPO)

    def test_a_missing_file(self, hub: LoopbackHub, pushed: Path) -> None:
        manifest = json.loads((pushed / MANIFEST).read_text())
        manifest["files"]["model-x.safetensors"] = {"size": 1, "sha256": "0" * 64}
        hub.state.put(REPO, {MANIFEST: json.dumps(manifest).encode()})
        with pytest.raises(HubError, match=r"model-x\.safetensors is missing there"):
            npuq.pull(REPO)


class TestByName:
    """`user/repo` where a directory is expected."""

    def test_load_generates_the_same_text(self, hub: LoopbackHub, pushed: Path) -> None:
        (here,) = npuq.load(pushed).generate(["Once upon a time"], max_new_tokens=8, temperature=0)
        (there,) = npuq.load(REPO).generate(["Once upon a time"], max_new_tokens=8, temperature=0)
        assert here.token_ids == there.token_ids

    def test_command(self, hub: LoopbackHub, pushed: Path) -> None:
        done = npuq_run("generate", REPO, "--prompt", "Once", "--max-new-tokens", "3", "--json")
        assert done.returncode == 0, done.stderr
        assert [each["completion_tokens"] for each in json.loads(done.stdout)] == [3]

    def test_a_report(self, hub: LoopbackHub, pushed: Path, tmp_path: Path) -> None:
        done = npuq_run("report", REPO, "-o", tmp_path / "report.html")
        assert done.returncode == 0, done.stderr
        assert f"<title>{REPO}: quantization report</title>" in (tmp_path / "report.html").read_text(encoding="utf-8")

    def test_an_unquantized_checkpoint(
        self, hub: LoopbackHub, example_fp8: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        names = [path.name for path in example_fp8.iterdir()]
        hub.state.put("alice/float", {name: (example_fp8 / name).read_bytes() for name in names} | {"big.bin": b"x"})
        fetched = resolve("alice/float")
        assert sorted(path.name for path in fetched.iterdir()) == sorted(names)
        assert all((fetched / name).read_bytes() == (example_fp8 / name).read_bytes() for name in names)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert resolve("alice/float") == fetched
        use_cache(monkeypatch, tmp_path / "empty")
        with pytest.raises(HubError, match="no such directory here; on the hub"):
            resolve("alice/float")

    def test_what_modelslim_quantized(self, hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
        theirs = as_modelslim(artifact, tmp_path / "theirs")
        hub.state.put("alice/theirs", files_of(theirs))
        fetched = resolve("alice/theirs")
        assert sorted(path.name for path in fetched.iterdir()) == sorted(path.name for path in theirs.iterdir())
        assert npuq.verify(fetched).problems == ()
        done = npuq_run("pull", "alice/theirs")
        assert done.returncode == 1 and done.stderr.count("\n") == 1
        assert "not an artifact of npuq's; run `npuq convert` on what another tool has quantized" in done.stderr

    def test_a_revision(self, hub: LoopbackHub, pushed: Path) -> None:
        commit = hub.state.repos[REPO].branches["main"]
        hub.state.put(REPO, {CARD: b"changed"})
        assert resolve(f"{REPO}@{commit}").name == commit
        done = npuq_run("pull", f"{REPO}@{commit}", "--quiet")
        assert (done.returncode, Path(done.stdout.strip()).name) == (0, commit), done.stderr
        for wrong in ((f"{REPO}@{commit}", "--revision", "main"), (f"{REPO}@",)):
            done = npuq_run("pull", *wrong)
            assert (done.returncode, "give the revision once" in done.stderr) == (2, True)

    def test_what_exists_here_is_a_path(
        self, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "alice" / "tiny-w4a8").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert resolve(REPO) == Path(REPO)
        assert not hub.log
