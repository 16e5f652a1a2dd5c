"""Pull against the loopback hub: resumed inside files, checked by hash, offline, into the cache."""

from __future__ import annotations

import errno
import json
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fault_tables import PULL
from faults import Fault
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from loopback import LoopbackHub
from support import (
    MANIFEST,
    REPO,
    alter,
    contents,
    files_of,
    kill_when,
    npuq_process,
    npuq_run,
    shards,
)

import npuq
from npuq.errors import HubError, NpuqError
from npuq.hub import resolve
from npuq.hub.transfer.retry import Backoff

SHARD = "model-00002-of"


@pytest.mark.parametrize("fault", PULL.values(), ids=PULL.keys())
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
