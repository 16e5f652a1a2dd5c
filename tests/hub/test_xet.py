"""Hubs with Xet and without, clients with hf_xet: which way content goes, and that everybody gets the same bytes.

The client has its defaults here: it sends and fetches by Xet whatever it can. The Xet side is the real hf_xet's.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from loopback import LoopbackHub
from support import CARD, REPO, assert_pushed, contents, files_of, npuq_run, shards

import npuq
from npuq.hub import open_remote, resolve


def asked_of_xet(hub: LoopbackHub) -> list[str]:
    return [seen.request for seen in hub.requests("/xet-(read|write)-token/")]


@pytest.fixture(params=["with Xet", "without"])
def any_hub(request: pytest.FixtureRequest, hub: LoopbackHub) -> LoopbackHub:
    if request.param == "without":
        hub.xet = None
    return hub


def test_a_push_goes_by_lfs(any_hub: LoopbackHub, artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    npuq.push(artifact, REPO)
    assert_pushed(any_hub, artifact)
    assert not asked_of_xet(any_hub)
    assert any_hub.uploaded_bytes() == sum(path.stat().st_size for path in artifact.rglob("*.safetensors"))
    assert not caplog.messages  # the client warns of what is meant here


def test_the_command(any_hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    done = npuq_run("push", artifact, REPO, "--quiet")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    done = npuq_run("pull", REPO, tmp_path / "there", "--quiet")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert contents(tmp_path / "there") == contents(artifact)
    assert not asked_of_xet(any_hub)


def test_what_npuq_pushed_comes_by_xet_to_others(hub: LoopbackHub, artifact: Path) -> None:
    npuq.push(artifact, REPO)
    fetched = Path(HfApi().snapshot_download(REPO))
    assert asked_of_xet(hub)
    assert {name: (fetched / name).read_bytes() for name in contents(artifact)} == contents(artifact)


def test_what_others_pushed_by_xet_is_pulled(hub: LoopbackHub, artifact: Path, tmp_path: Path) -> None:
    upload_by_xet(hub, artifact)
    hub.log.clear()
    assert contents(npuq.pull(REPO)) == contents(artifact)
    assert contents(npuq.pull(REPO, tmp_path / "there")) == contents(artifact)
    assert not asked_of_xet(hub)


def test_a_push_onto_what_came_by_xet_sends_nothing(hub: LoopbackHub, artifact: Path) -> None:
    upload_by_xet(hub, artifact)
    hub.log.clear()
    assert npuq.push(artifact, REPO).sent_files == 1  # the card, which now names the repository
    assert hub.uploaded_bytes() == 0
    assert_pushed(hub, artifact)


def test_a_checkpoint_that_came_by_xet_is_streamed_and_fetched(
    hub: LoopbackHub, example_fp8: Path, tmp_path: Path
) -> None:
    upload_by_xet(hub, example_fp8)
    hub.log.clear()
    with open_remote(REPO, tmp_path / "window") as checkpoint:
        npuq.convert_checkpoint(checkpoint, tmp_path / "streamed", method="minmax")
    npuq.convert_checkpoint(example_fp8, tmp_path / "local", method="minmax")
    assert shards(tmp_path / "streamed")[0].read_bytes() == shards(tmp_path / "local")[0].read_bytes()
    fetched = resolve(REPO)
    assert files_of(fetched) == {path.name: path.read_bytes() for path in example_fp8.iterdir()}
    assert not asked_of_xet(hub)


def test_what_the_client_fetched_by_xet_is_used(hub: LoopbackHub, artifact: Path) -> None:
    """The client keeps it in a store that the whole cache shares, a link further away."""
    upload_by_xet(hub, artifact)
    fetched = Path(HfApi().snapshot_download(REPO))
    stored = shards(fetched)[0].resolve()
    assert stored.is_relative_to(Path(constants.HF_HUB_CACHE) / "blobs")
    hub.log.clear()
    assert npuq.pull(REPO) == fetched
    assert not hub.requests("^GET .*/resolve/")
    assert npuq.verify(fetched).ok
    # A damaged one is replaced in this repository alone: others may use the store's.
    stored.chmod(0o644)
    stored.write_bytes(bytes(stored.stat().st_size))
    assert contents(npuq.pull(REPO)) == contents(artifact)
    assert stored.read_bytes() == bytes(stored.stat().st_size)


def test_the_client_finds_what_npuq_pulled(hub: LoopbackHub, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npuq.push(artifact, REPO)
    pulled = npuq.pull(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in (*contents(artifact), CARD):
        assert Path(HfApi().hf_hub_download(REPO, name)) == pulled / name
        assert (pulled / name).is_symlink()
    assert Path(HfApi().snapshot_download(REPO)) == pulled


def upload_by_xet(hub: LoopbackHub, folder: Path) -> None:
    assert hub.xet is not None
    for path in folder.rglob("*.safetensors"):
        hub.xet.know(path)
    api = HfApi()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert asked_of_xet(hub)
    assert hub.uploaded_bytes() == 0
    names = {os.fspath(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert set(hub.state.files(REPO)) == {*names, ".gitattributes"}
