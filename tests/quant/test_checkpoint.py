"""Opening directories of safetensors, and reading them by rows, whole and mapped."""

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from npuq.errors import CheckpointError
from npuq.formats.checkpoint import INDEX_NAME, Checkpoint, natural_key


def make(directory: Path, shards: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | None = None) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text("{}")
    for name, tensors in shards.items():
        save_file(tensors, directory / name)
    if index is None:
        index = {tensor: shard for shard, tensors in shards.items() for tensor in tensors}
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    one = {"layers.10.w": torch.randn(6, 4), "layers.2.w": torch.randn(5, 3).bfloat16()}
    return make(tmp_path / "model", {"one.safetensors": one, "two.safetensors": {"head": torch.randn(3)}})


def test_tensors_come_in_natural_order_from_any_shard(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        assert list(checkpoint.tensors) == ["head", "layers.2.w", "layers.10.w"]
        for shard in ("one", "two"):
            for name, value in load_file(directory / f"{shard}.safetensors").items():
                assert torch.equal(checkpoint.read(name), value)
                assert torch.equal(checkpoint.view(name), value)
                assert torch.equal(checkpoint.read_rows(name, 1, 3), value[1:3])


def test_bytes_are_read_into_given_memory(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        stored = checkpoint.read("layers.10.w").numpy().tobytes()
        memory = bytearray(50)
        checkpoint.read_bytes("layers.10.w", 8, memoryview(memory)[:40])
        assert memory == stored[8:48] + bytes(10)
        for first, count in ((-1, 4), (90, 7), (97, 0)):
            with pytest.raises(CheckpointError, match="no bytes"):
                checkpoint.read_bytes("layers.10.w", first, memoryview(bytearray(count)))


def test_views_outlive_the_checkpoint(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        view = checkpoint.view("layers.10.w")
    assert torch.equal(view, load_file(directory / "one.safetensors")["layers.10.w"])


def test_writing_to_a_view_never_reaches_the_file(directory: Path) -> None:
    before = (directory / "one.safetensors").read_bytes()
    with Checkpoint.open(directory) as checkpoint:
        checkpoint.view("layers.10.w").fill_(7)
    assert (directory / "one.safetensors").read_bytes() == before


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert list(Checkpoint.open(tmp_path).tensors) == ["a"]


def test_a_snapshot_of_the_hugging_face_cache_is_read(directory: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert list(Checkpoint.open(snapshot).tensors) == ["head", "layers.2.w", "layers.10.w"]


def test_natural_order() -> None:
    names = ["a.10.b", "a.9.c", "a.9.b", "b", "a"]
    assert sorted(names, key=natural_key) == ["a", "a.9.b", "a.9.c", "a.10.b", "b"]


@given(st.lists(st.text(st.characters() | st.sampled_from("019²٣๒½①")), max_size=8))
def test_all_names_have_an_order(names: list[str]) -> None:
    assert sorted(map(natural_key, names)) == sorted(map(natural_key, names[::-1]))


def damage_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def outside(directory: Path) -> str:
    target = directory.parent / "x.safetensors"
    save_file({"a": torch.ones(1)}, target)
    return str(target)


BAD = {
    "no directory": (lambda d: d.rename(d.parent / "gone"), "no such directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "config.json: missing"),
    "config not JSON": (lambda d: (d / "config.json").write_text("{"), "not valid JSON"),
    "config not an object": (lambda d: (d / "config.json").write_text("[]"), "not a JSON object"),
    "missing shard": (lambda d: (d / "two.safetensors").unlink(), "two.safetensors: missing"),
    "truncated shard": (lambda d: os.truncate(d / "two.safetensors", 70), "two.safetensors: truncated"),
    "absent tensor": (
        lambda d: damage_index(d, {"nope": "one.safetensors"}),
        "tensor 'nope' is not in one.safetensors",
    ),
    "weight map of lists": (lambda d: damage_index(d, {"a": ["one.safetensors"]}), "weight_map"),
    "empty weight map": (lambda d: damage_index(d, {}), "weight_map is empty"),
    "shard above": (
        lambda d: (outside(d), damage_index(d, {"a": "../x.safetensors"})),
        "weight_map: '../x.safetensors' is not a file name that may be used",
    ),
    "absolute shard": (lambda d: damage_index(d, {"a": outside(d)}), "is not a file name that may be used"),
    "link out": (
        lambda d: (
            outside(d),
            (d / "x.safetensors").symlink_to("../x.safetensors"),
            damage_index(d, {"a": "x.safetensors"}),
        ),
        "outside the directory",
    ),
    "link to itself": (
        lambda d: (
            (d / "x.safetensors").symlink_to("x.safetensors"),
            damage_index(d, {"a": "x.safetensors"}),
        ),
        "'x.safetensors' is no file that can be opened",
    ),
    "NUL in a shard's name": (
        lambda d: damage_index(d, {"a": "x\0.safetensors"}),
        "is not a file name that may be used",
    ),
    "config is a FIFO": (
        lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")),
        "config.json: is not a regular file",
    ),
    "index is a device": (
        lambda d: ((d / INDEX_NAME).unlink(), (d / INDEX_NAME).symlink_to("/dev/zero")),
        "a link to /dev/zero, outside the directory",
    ),
    "index is a link to nowhere": (
        lambda d: ((d / INDEX_NAME).unlink(), (d / INDEX_NAME).symlink_to("gone.json")),
        "model.safetensors.index.json: missing",
    ),
    "config lies elsewhere": (
        lambda d: (
            (d / "config.json").rename(d.parent / "config.json"),
            (d / "config.json").symlink_to("../config.json"),
        ),
        "config.json: a link to",
    ),
    "surrogate in config": (lambda d: (d / "config.json").write_text('{"a": "\\ud800"}'), "lone surrogate U+D800"),
    "several files, no index": (lambda d: (d / INDEX_NAME).unlink(), "no model.safetensors.index.json"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_directories_are_refused_by_name(kind: str, directory: Path) -> None:
    damage, message = BAD[kind]
    damage(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickle_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickle"):
        Checkpoint.open(tmp_path)


def test_reading_what_is_not_there(directory: Path) -> None:
    with Checkpoint.open(directory) as checkpoint:
        with pytest.raises(CheckpointError, match="no tensor named 'x'"):
            checkpoint.read("x")
        with pytest.raises(CheckpointError, match="no rows 2 to 7"):
            checkpoint.read_rows("layers.10.w", 2, 7)
        os.truncate(directory / "one.safetensors", 200)
        with pytest.raises(CheckpointError, match=r"one\.safetensors: truncated"):
            checkpoint.read("layers.10.w")
