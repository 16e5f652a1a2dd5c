"""Conversion straight from the hub: a window smaller than the checkpoint, faults, kills, and shards pushed as they
are finished. The artifact must be that of a conversion from the disk, to the byte."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Fault
from loopback import LoopbackHub
from safetensors.torch import load_file, save_file
from support import MANIFEST, REPO, as_modelslim, assert_pushed, contents, files_of, kill_when, npuq_process, npuq_run

import npuq
from npuq.convert import convert_checkpoint
from npuq.errors import CheckpointError, HubError, RecipeError
from npuq.hub import RemoteCheckpoint, resolve
from npuq.hub.transfer.retry import Backoff

SOURCE = "alice/source"
OPTIONS = {"method": "minmax", "max_shard_size": 2_000_000}
WINDOW = 2_500_000  # an eighth of the checkpoint


@pytest.fixture
def source(hub: LoopbackHub, example_fp8: Path) -> str:
    """The shipped checkpoint on the hub; returns the commit."""
    card = b"---\nlicense: mit\n---\n# Source\n"
    files = files_of(example_fp8)
    return hub.state.put(SOURCE, {**files, "README.md": card}).sha


@pytest.fixture(scope="module")
def expected(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The artifact of a conversion from the disk."""
    path = tmp_path_factory.mktemp("expected") / "out"
    convert_checkpoint(example_fp8, path, **OPTIONS)  # type: ignore[arg-type]
    return {name: content for name, content in contents(path).items() if name != MANIFEST}


@contextlib.contextmanager
def remote(output: Path, backoff: Backoff | None = None, window_bytes: int = WINDOW) -> Iterator[RemoteCheckpoint]:
    folder = output / "npuq" / "download"
    with RemoteCheckpoint.open_remote(SOURCE, folder, window_bytes=window_bytes, backoff=backoff) as checkpoint:
        yield checkpoint


def without_manifest(output: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(output).items() if name != MANIFEST}


def test_the_same_artifact_in_a_small_window(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
        assert checkpoint.window.most_resident <= WINDOW
    assert without_manifest(tmp_path / "out") == expected
    assert not (tmp_path / "out" / "npuq" / "download").exists()
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["source"]["repo"] == SOURCE
    assert manifest["source"]["revision"] == source
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert f"base_model: {SOURCE}\nbase_model_relation: quantized" in card
    # Every weight was fetched once; headers, and small gaps between tensors, come on top.
    total = sum(blob.size for name, blob in hub.state.repos[SOURCE].commit("main").files.items() if "safe" in name)
    fetched = sum(seen.sent for seen in hub.requests(r"^GET .*\.safetensors$"))
    assert total <= fetched + 100_000 <= total + 3 * (1 << 20) + 1_000_000
    assert npuq.verify(tmp_path / "out").ok


@pytest.mark.parametrize("method", ["rotate+mse", "gptq", "smooth+mse"])
def test_methods_that_read_weights_twice_are_refused(
    hub: LoopbackHub, source: str, tmp_path: Path, method: str
) -> None:
    with remote(tmp_path / "out") as checkpoint, pytest.raises(RecipeError, match="fetch it first"):
        convert_checkpoint(checkpoint, tmp_path / "out", method=method)
    assert not (tmp_path / "out" / MANIFEST).exists()


def test_dry_run_reads_headers_alone_and_writes_nothing(hub: LoopbackHub, source: str, tmp_path: Path) -> None:
    done = npuq_run("convert", SOURCE, tmp_path / "out", "--download-window", "3MB", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["status"] == "planned"
    # The window, and some MB beside the shards: index, tables, tokenizer.
    assert 3_000_000 < plan["disk_bytes_needed"] - plan["output_bytes"] < 5_000_000
    assert len(hub.requests(r"^GET .*\.safetensors$")) == 3
    assert not (tmp_path / "out").exists()


def test_revision_pins_and_a_moved_branch_is_refused(hub: LoopbackHub, source: str, tmp_path: Path) -> None:
    arguments = ("convert", SOURCE, tmp_path / "out", "--method", "minmax", "--quiet", "--json")
    assert npuq_run(*arguments).returncode == 0
    moved = hub.state.put(SOURCE, {"generation_config.json": b"{}"}).sha
    again = npuq_run(*arguments)
    assert again.returncode == 1
    assert source in again.stderr and moved in again.stderr
    pinned = npuq_run(*arguments, "--revision", source)
    assert json.loads(pinned.stdout)["status"] == "finished"


def test_a_window_smaller_than_a_tensor(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with remote(tmp_path / "out", window_bytes=1) as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", workers=3, **OPTIONS)  # type: ignore[arg-type]
    assert without_manifest(tmp_path / "out") == expected


def test_a_repository_that_modelslim_quantized(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """Its files have other names, and neither manifest nor tables."""
    convert_checkpoint(example_fp8, tmp_path / "ours", **OPTIONS)  # type: ignore[arg-type]
    theirs = as_modelslim(tmp_path / "ours", tmp_path / "theirs")
    hub.state.put(SOURCE, files_of(theirs))
    convert_checkpoint(theirs, tmp_path / "local", max_shard_size=2_000_000)
    with remote(tmp_path / "out") as checkpoint:
        summary = convert_checkpoint(checkpoint, tmp_path / "out", max_shard_size=2_000_000)
        assert checkpoint.window.most_resident <= WINDOW
    assert (summary.status, summary.recipe) == ("converted", "stored")
    local, streamed = without_manifest(tmp_path / "local"), without_manifest(tmp_path / "out")
    assert local.keys() == streamed.keys()
    assert all(content == streamed[name] for name, content in local.items() if name != "README.md")
    assert npuq.verify(tmp_path / "out").ok


def test_both_ways_leave_the_same_files(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """From a directory, streamed, and fetched first: whatever lies beside the weights."""
    beside = (
        "NOTICE.txt",
        "LICENSE",
        "LICENSE-MODEL",
        "modeling_deepseek.py",
        "tokenizer.model",
        "chat_template.jinja",
    )
    others = ("picture.png", "README.md", "notes.json", "adapter.bin", "NOTICE/x", "a/tokenizer.json", "tiktoken.model")
    directory = tmp_path / "source"
    for path in example_fp8.iterdir():
        (directory / path.name).parent.mkdir(exist_ok=True)
        (directory / path.name).write_bytes(path.read_bytes())
    for name in (*beside, *others):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(name)
    files = files_of(directory)
    hub.state.put(SOURCE, files)
    convert_checkpoint(directory, tmp_path / "local", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "streamed") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "streamed", **OPTIONS)  # type: ignore[arg-type]
    convert_checkpoint(resolve(SOURCE), tmp_path / "fetched", **OPTIONS)  # type: ignore[arg-type]
    local = without_manifest(tmp_path / "local")
    assert {*beside, "tiktoken.model"} <= local.keys()
    assert not {"picture.png", "notes.json", "adapter.bin"} & local.keys()
    for name in ("streamed", "fetched"):
        assert without_manifest(tmp_path / name) == local


def test_shards_of_one_name_in_two_folders(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """And one that could be taken for another where `/` is written as `_`."""
    names = ["model-1.safetensors", "a/model-1.safetensors", "a_model-1.safetensors"]
    renamed = dict(zip(sorted(path.name for path in example_fp8.glob("*.safetensors")), names, strict=True))
    directory = tmp_path / "source"
    (directory / "a").mkdir(parents=True)
    for path in example_fp8.iterdir():
        content = path.read_bytes()
        if path.name == "model.safetensors.index.json":
            index = json.loads(content)
            index["weight_map"] = {name: renamed[shard] for name, shard in index["weight_map"].items()}
            content = json.dumps(index).encode()
        (directory / renamed.get(path.name, path.name)).write_bytes(content)
    files = files_of(directory)
    hub.state.put(SOURCE, files)
    convert_checkpoint(directory, tmp_path / "local", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "streamed") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "streamed", **OPTIONS)  # type: ignore[arg-type]
    assert without_manifest(tmp_path / "streamed") == without_manifest(tmp_path / "local")
    # What is fetched first, for a model to run, has them all.
    fetched = resolve(SOURCE)
    assert {name for name in names if (fetched / name).is_file()} == {*names}


def test_what_another_commit_left_in_the_window_is_not_used(
    hub: LoopbackHub, source: str, example_fp8: Path, tmp_path: Path
) -> None:
    """The same shard, size and range, and other bytes."""

    def first(window: Path) -> bytes:
        with RemoteCheckpoint.open_remote(SOURCE, window) as checkpoint:
            name = next(name for name, info in checkpoint.tensors.items() if info.nbytes > 1000)
            checkpoint.expect([(name,)], ())
            memory = bytearray(checkpoint.info(name).nbytes)
            checkpoint.read_bytes(name, 0, memoryview(memory))
            return bytes(memory)

    before = first(tmp_path / "window")
    assert list((tmp_path / "window").iterdir())
    for path in example_fp8.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        (length,) = struct.unpack("<Q", content[:8])
        content[8 + length :] = bytes(255 - byte for byte in content[8 + length :])
        hub.state.put(SOURCE, {path.name: bytes(content)})
    assert first(tmp_path / "window") == bytes(255 - byte for byte in before)


FAULTS = {
    "500 on the repository": Fault(f"models/{SOURCE}/revision|models/{SOURCE}$", status=500),
    "500 on a header": Fault(r"^GET .*\.safetensors", status=500),
    "500 on a range": Fault(r"^GET .*\.safetensors", after=5, status=500, times=3),
    "resets amid ranges": Fault(r"^GET .*\.safetensors", after=4, reset_after=100_000, times=5),
    "reset before a range": Fault(r"^GET .*\.safetensors", after=6, reset_before=True),
    "a range cut short": Fault(r"^GET .*\.safetensors", after=6, truncate=10),
    "slow": Fault(r"^GET .*\.safetensors", after=6, bytes_per_second=3_000_000, times=2),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_is_survived(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path, backoff: Backoff, fault: Fault
) -> None:
    hub.faults.add(fault)
    with remote(tmp_path / "out", backoff) as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert hub.faults.hits == fault.times
    assert without_manifest(tmp_path / "out") == expected


def test_a_hub_that_goes_away_and_comes_back(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path, backoff: Backoff
) -> None:
    hub.faults.add(Fault(r"^GET .*\.safetensors", after=12, status=500, times=10**6))
    with remote(tmp_path / "out", backoff) as checkpoint, pytest.raises(HubError, match="the hub keeps failing"):
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert not (tmp_path / "out" / MANIFEST).exists()
    hub.faults.clear()
    with remote(tmp_path / "out", backoff) as checkpoint:
        summary = convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert summary.jobs_resumed > 0
    assert without_manifest(tmp_path / "out") == expected


def test_disk_full(
    hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, calls = os.fsync, itertools.count()

    def full(descriptor: int) -> None:
        if "download" in str(Path(f"/proc/self/fd/{descriptor}").readlink()) and next(calls) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    message = "download: cannot be written: No space left on device; make room, or give a smaller --download-window"
    with remote(tmp_path / "out") as checkpoint, pytest.raises(CheckpointError, match=message):
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    assert without_manifest(tmp_path / "out") == expected


def test_killed_and_run_again(hub: LoopbackHub, source: str, expected: dict[str, bytes], tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["convert", SOURCE, output, "--method", "minmax", "--max-shard-size", "2MB", "--quiet"]
    arguments += ["--download-window", "2MB"]
    for requests in (12, 25):
        start = len(hub.requests(r"^GET .*\.safetensors"))
        process = npuq_process(*arguments)
        killed = kill_when(
            process, lambda wanted=start + requests: len(hub.requests(r"^GET .*\.safetensors")) >= wanted
        )
        assert killed
        assert not (output / MANIFEST).exists()
    done = npuq_run(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert without_manifest(output) == expected
    assert not (output / "npuq" / "download").exists()


def test_what_was_fetched_before_an_interruption_is_used(
    hub: LoopbackHub, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, names = tmp_path / "window", []
    with RemoteCheckpoint.open_remote(SOURCE, folder, window_bytes=10**9) as checkpoint:
        names = [name for name, info in checkpoint.tensors.items() if info.nbytes > 1000][:40]
        checkpoint.expect([(name,) for name in names], ())
        before = {name: checkpoint.read(name) for name in names}
        checkpoint.release((names[0],))
    (folder / "notes.txt").write_text("not ours")
    hub.log.clear()
    with RemoteCheckpoint.open_remote(SOURCE, folder, window_bytes=10**9) as checkpoint:
        asked = len(hub.log)
        checkpoint.expect([(name,) for name in names], {names[0]})
        assert all(
            bool((checkpoint.read(name).view(-1) == before[name].view(-1)).all())
            for name in names[1:]
            if before[name].element_size() > 1
        )
        assert len(hub.log) == asked
        for name in names[1:]:
            checkpoint.release((name,))
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_interrupt_wakes_a_waiting_read(hub: LoopbackHub, source: str, tmp_path: Path) -> None:
    import threading

    with RemoteCheckpoint.open_remote(SOURCE, tmp_path / "window") as checkpoint:
        hub.faults.add(Fault(r"^GET .*\.safetensors", bytes_per_second=10_000, times=10**6))
        name = max(checkpoint.tensors, key=lambda name: checkpoint.tensors[name].nbytes)
        checkpoint.expect([(name,)], ())
        raised: list[Exception] = []

        def read() -> None:
            try:
                checkpoint.read(name)
            except CheckpointError as error:
                raised.append(error)

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.01)
        checkpoint.interrupt()
        thread.join(timeout=5)
        assert not thread.is_alive()
        assert "interrupted" in str(raised[0])


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


class TestRefused:
    def test_a_shard_that_is_not_there(self, hub: LoopbackHub, source: str, tmp_path: Path) -> None:
        del hub.state.repos[SOURCE].commit("main").files["model-00002-of-000003.safetensors"]
        with (
            pytest.raises(CheckpointError, match=r"model-00002-of-000003\.safetensors is missing there"),
            remote(tmp_path),
        ):
            pass

    def test_a_truncated_shard(self, hub: LoopbackHub, source: str, example_fp8: Path, tmp_path: Path) -> None:
        name = "model-00002-of-000003.safetensors"
        hub.state.put(SOURCE, {name: (example_fp8 / name).read_bytes()[:-5]})
        with pytest.raises(CheckpointError, match=f"{name}: truncated"), remote(tmp_path):
            pass

    def test_no_checkpoint(self, hub: LoopbackHub, tmp_path: Path) -> None:
        hub.state.put(SOURCE, {"a.txt": b""})
        with pytest.raises(HubError, match=r"has no config\.json; it is not a checkpoint"), remote(tmp_path):
            pass

    def test_pickles(self, hub: LoopbackHub, tmp_path: Path) -> None:
        hub.state.put(SOURCE, {"config.json": b"{}", "pytorch_model.bin": b""})
        with pytest.raises(CheckpointError, match="pickle weights are not read"), remote(tmp_path):
            pass

    def test_neither_here_nor_there(self, hub: LoopbackHub, tmp_path: Path) -> None:
        done = npuq_run("convert", "alice/none", tmp_path / "out")
        assert done.returncode == 1
        assert "no such directory here; on the hub" in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_tied_head_passes_by_with_the_embedding(hub: LoopbackHub, example_fp8: Path, tmp_path: Path) -> None:
    """One stored tensor, two of the artifact: whether it is fetched once or twice, they are those from the disk."""
    directory = Path(shutil.copytree(example_fp8, tmp_path / "tied"))
    index_path, config_path = directory / "model.safetensors.index.json", directory / "config.json"
    index = json.loads(index_path.read_text())
    shard = directory / index["weight_map"].pop("lm_head.weight")
    tensors = load_file(shard)
    del tensors["lm_head.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    index_path.write_text(json.dumps(index))
    config_path.write_text(json.dumps(json.loads(config_path.read_text()) | {"tie_word_embeddings": True}))
    hub.state.put(SOURCE, files_of(directory))
    convert_checkpoint(directory, tmp_path / "disk", **OPTIONS)  # type: ignore[arg-type]
    with remote(tmp_path / "out") as checkpoint:
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)  # type: ignore[arg-type]
    expected = {name: content for name, content in contents(tmp_path / "disk").items() if name.endswith("safetensors")}
    assert {name: content for name, content in contents(tmp_path / "out").items() if name in expected} == expected
    assert npuq.verify(tmp_path / "out", directory).ok
