"""What changes between two runs of a conversion, or during one: shards and sources, at the same size."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import add_tokenizer, text
from safetensors.torch import load_file, save_file

from npuq.convert import CalibrationText, convert_checkpoint
from npuq.convert.conversion import Internals
from npuq.convert.plan.prepare import prepare
from npuq.convert.write.pipeline import Durability
from npuq.errors import CheckpointError, ConversionError
from npuq.formats.checkpoint import Checkpoint
from npuq.progress import Silent

OPTIONS: dict[str, Any] = {"method": "minmax", "max_shard_size": 60_000, "workers": 2}
JOBS = 99
# The first rename after the journal's own is the first of the finish: all jobs are done, and all shards hashed.
BEFORE_FINISH: dict[str, Any] = {"kill_at": 2, "calls": ["replace", "rename"]}


class Notes(Silent):
    """Keeps what a user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str, /) -> None:
        self.lines.append(text)


@pytest.fixture
def own_source(v3_source, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(v3_source, tmp_path / "own" / v3_source.name))


def interrupted(source: Path, output: Path, after: int, **options: Any) -> None:
    """A conversion that ends after so many writes, one job after the other, each journaled."""
    count = 0

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(28, "No space left on device")
        return os.pwrite(descriptor, data, offset)

    with pytest.raises(ConversionError, match="No space left"):
        convert_checkpoint(
            source, output, **(OPTIONS | options | {"workers": 1}), internals=Internals(Durability(0.0, 1), write)
        )


def place_of(source: Path, tensor: str) -> tuple[Path, int, int]:
    """The file of a tensor, and where its bytes begin and end."""
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        if tensor in header:
            begin, end = header[tensor]["data_offsets"]
            return path, 8 + length + begin, 8 + length + end
    raise KeyError(tensor)


def flip(path: Path, position: int, *, times: bool = True) -> None:
    """Change a bit in place: the file keeps its size and inode, and with `times` its mtime."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))
    if times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def change(source: Path, tensor: str) -> Path:
    """Another value in the middle of a tensor."""
    path, begin, end = place_of(source, tensor)
    flip(path, (begin + end) // 2 // 2 * 2)
    return path


# ---- shards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_bit_of_a_finished_shard(seed, rig, v3_source, v3_artifact, tmp_path, tree):
    """Anywhere behind the headers; only the weight that it belongs to is made again."""
    output, draw = tmp_path / "out", random.Random(seed)
    assert rig(v3_source, output, options=OPTIONS, **BEFORE_FINISH)["killed"]
    shard = draw.choice(sorted(output.glob("*.safetensors")))
    with shard.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    flip(shard, draw.randrange(8 + length, shard.stat().st_size))
    notes = Notes()
    summary = convert_checkpoint(v3_source, output, **OPTIONS, progress=notes)
    assert summary.jobs_resumed == JOBS - 1
    assert any(line.startswith(f"{shard}: 1 of its") and "not as they were written" in line for line in notes.lines)
    assert tree(output) == tree(v3_artifact)


def test_a_page_of_an_unfinished_shard_that_was_never_written(v3_source, v3_artifact, tmp_path, tree):
    output = tmp_path / "out"
    interrupted(v3_source, output, 60)
    shard = sorted(output.glob("*.safetensors"))[0]
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size // 3)
        file.truncate(size)
    summary = convert_checkpoint(v3_source, output, **OPTIONS)
    assert summary.status == "converted"
    assert tree(output) == tree(v3_artifact)


def test_a_kill_while_damage_is_mended(rig, v3_source, v3_artifact, tmp_path, tree):
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, **BEFORE_FINISH)["killed"]
    for shard in output.glob("*.safetensors"):
        flip(shard, shard.stat().st_size - 1)
    assert rig(v3_source, output, options=OPTIONS, kill_at=5, calls=["pwrite", "fdatasync"])["killed"]
    assert rig(v3_source, output, options=OPTIONS)["summary"]["jobs_resumed"] < JOBS
    assert tree(output) == tree(v3_artifact)


def test_a_shard_that_cannot_be_read_is_one_line(rig, v3_source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, **BEFORE_FINISH)["killed"]

    def fails(*arguments: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("npuq.convert.write.shards.os.preadv", fails)
    with pytest.raises(ConversionError, match=r"\.safetensors: cannot be read back: Input/output error; remove it"):
        convert_checkpoint(v3_source, output, **OPTIONS)


# ---- the source ------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.mark.parametrize("tensor", [EXPERT, EXPERT + "_scale_inv", "model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_changed_are_converted_again(tensor, rig, own_source, v3_artifact, tmp_path, tree):
    """At the same size, with the time put back: what comes out is an artifact of what the source holds now."""
    output = tmp_path / "out"
    assert rig(own_source, output, options=OPTIONS, **BEFORE_FINISH)["killed"]
    path = change(own_source, tensor)
    notes = Notes()
    summary = convert_checkpoint(own_source, output, **OPTIONS, progress=notes)
    assert summary.jobs_resumed == JOBS - 1
    assert any(line.startswith(f"{path}: holds other weights") for line in notes.lines)
    convert_checkpoint(own_source, tmp_path / "fresh", **OPTIONS)
    assert tree(output) == tree(tmp_path / "fresh") != tree(v3_artifact)


def touched(source: Path) -> None:
    for path in source.iterdir():
        path.touch()


def copied(source: Path) -> None:
    shutil.copytree(source, source.parent / "copy")
    shutil.rmtree(source)
    (source.parent / "copy").rename(source)


def linked(source: Path) -> None:
    """As `chmod` and hard links do: only the ctime is another."""
    for path in source.iterdir():
        path.chmod(0o640)


@pytest.mark.parametrize("what", [touched, copied, linked])
def test_the_same_bytes_again_cost_no_work(what, rig, own_source, v3_artifact, tmp_path, tree):
    output = tmp_path / "out"
    assert rig(own_source, output, options=OPTIONS, **BEFORE_FINISH)["killed"]
    what(own_source)
    notes = Notes()
    assert convert_checkpoint(own_source, output, **OPTIONS, progress=notes).jobs_resumed == JOBS
    assert any("written, copied or fetched since" in line for line in notes.lines)
    assert tree(output) == tree(v3_artifact)


def test_files_that_did_not_change_are_not_read(rig, own_source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert rig(own_source, output, options=OPTIONS, **BEFORE_FINISH)["killed"]
    monkeypatch.setattr("npuq.formats.checkpoint.Checkpoint.read_bytes", lambda *arguments: pytest.fail("read"))
    assert convert_checkpoint(own_source, output, **OPTIONS).jobs_resumed == JOBS


def test_what_was_compared_once_is_not_compared_again(rig, own_source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    assert rig(own_source, output, options=OPTIONS, **BEFORE_FINISH)["killed"]
    touched(own_source)
    assert rig(own_source, output, options=OPTIONS, kill_at=1, calls=["replace", "rename"])["killed"]
    monkeypatch.setattr("npuq.formats.checkpoint.Checkpoint.read_bytes", lambda *arguments: pytest.fail("read"))
    assert convert_checkpoint(own_source, output, **OPTIONS).jobs_resumed == JOBS


def test_a_norm_that_was_folded_into_others(own_source, tmp_path, tree):
    """A rotated weight holds the gain of a norm: it depends on both."""
    options = OPTIONS | {"method": "rotate+minmax"}
    interrupted(own_source, tmp_path / "out", 200, method="rotate+minmax")
    change(own_source, "model.layers.0.input_layernorm.weight")
    convert_checkpoint(own_source, tmp_path / "out", **options)
    convert_checkpoint(own_source, tmp_path / "fresh", **options)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def rewritten(path: Path, edit: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Put another file in a shard's place, under a new inode."""
    tensors = edit(load_file(path))
    save_file(tensors, path.with_suffix(".new"), metadata={"format": "pt"})
    path.with_suffix(".new").replace(path)


def test_a_shard_with_other_places_that_comes_after_the_headers_were_read(own_source, tmp_path):
    """Its bytes would be read as other tensors', and its stamp would vouch for that."""
    checkpoint = Checkpoint.open(own_source)
    shard = checkpoint.shards[0]
    name = next(name for name, info in checkpoint.tensors.items() if info.file == shard)
    rewritten(shard, lambda tensors: tensors | {name: torch.cat([tensors[name].float(), tensors[name].float()])})
    with pytest.raises(CheckpointError, match=f"{shard.name}: is another file than when it was opened; run the same"):
        convert_checkpoint(checkpoint, tmp_path / "out", **OPTIONS)


def test_a_shard_that_is_exchanged_while_it_is_converted(own_source, tmp_path, tree):
    """The old file stays open; what has its name at the end is another."""
    prepared = prepare(own_source, "w4a8", "minmax", 60_000)
    prepared.checkpoint.close()
    name, count = prepared.plan.turns[0].source, 0
    shard = place_of(own_source, name)[0]

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count == 100:
            rewritten(shard, lambda tensors: tensors | {name: torch.ones(tensors[name].shape).to(tensors[name].dtype)})
        return os.pwrite(descriptor, data, offset)

    with pytest.raises(ConversionError, match="1 of its weights changed while it was converted; run the same command"):
        convert_checkpoint(own_source, tmp_path / "out", internals=Internals(write=write), **OPTIONS)
    convert_checkpoint(own_source, tmp_path / "out", **OPTIONS)
    convert_checkpoint(own_source, tmp_path / "fresh", **OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_a_fresh_run_does_not_speak_of_an_interrupted_one(own_source, tmp_path):
    notes, count = Notes(), 0

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count == 100:
            os.utime(sorted(own_source.glob("*.safetensors"))[0])
        return os.pwrite(descriptor, data, offset)

    convert_checkpoint(own_source, tmp_path / "out", internals=Internals(write=write), **OPTIONS, progress=notes)
    assert any("since weights were read from it" in line for line in notes.lines)
    assert not any("interrupted" in line for line in notes.lines)


def test_weights_that_change_while_they_are_converted(own_source, tmp_path, tree):
    """The run says so at its end, and the next one puts it right."""
    prepared = prepare(own_source, "w4a8", "minmax", 60_000)
    prepared.checkpoint.close()
    first, count = prepared.plan.turns[0].source, 0

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count == 100:
            change(own_source, first)
        return os.pwrite(descriptor, data, offset)

    with pytest.raises(ConversionError, match="1 of its weights changed while it was converted; run the same command"):
        convert_checkpoint(own_source, tmp_path / "out", **OPTIONS, internals=Internals(write=write))
    assert not (tmp_path / "out" / "config.json").exists()
    summary = convert_checkpoint(own_source, tmp_path / "out", **OPTIONS)
    assert summary.jobs_resumed == JOBS - 1
    convert_checkpoint(own_source, tmp_path / "fresh", **OPTIONS)
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_files_that_are_touched_while_they_are_converted(own_source, v3_artifact, tmp_path, tree):
    count = 0

    def write(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal count
        count += 1
        if count == 100:
            touched(own_source)
        return os.pwrite(descriptor, data, offset)

    summary = convert_checkpoint(own_source, tmp_path / "out", **OPTIONS, internals=Internals(write=write))
    assert summary.status == "converted"
    assert tree(tmp_path / "out") == tree(v3_artifact)


# ---- calibrated ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def walked(write, rig, tmp_path_factory, tree) -> tuple[Path, dict[str, bytes]]:
    """A folder with the source and the output of a calibrated conversion, killed in its third layer, and what the
    artifact will be."""
    folder = tmp_path_factory.mktemp("walked")
    source = write(folder / "source", fp8_block=16)
    add_tokenizer(source)
    (folder / "text.txt").write_text(text(1000))
    options = {"method": "gptq", "calibration": [str(folder / "text.txt"), 8, 16], "workers": 1}
    assert rig(source, folder / "whole", options=options)["summary"]["status"] == "converted"
    assert rig(source, folder / "out", options=options, kill_at=7, calls=["replace"])["killed"]
    state = json.loads((folder / "out" / "npuq" / "calibration" / "state.json").read_text())
    assert state["layer"] >= 2
    return folder, tree(folder / "whole")


@pytest.fixture
def walk(walked, tmp_path) -> tuple[Path, Path, Callable[..., Any], dict[str, bytes]]:
    """A copy of it: source, output, how to run it, and what it will be."""
    folder, expected = walked
    shutil.copytree(folder, tmp_path / "walk")
    source, out, calibration_text = (tmp_path / "walk" / name for name in ("source", "out", "text.txt"))

    def run(output: Path = out, **more: Any) -> Any:
        return convert_checkpoint(
            source, output, method="gptq", calibration=CalibrationText(calibration_text, 8, 16), **more
        )

    return source, out, run, expected


@pytest.mark.parametrize("tensor", ["model.layers.0.mlp.gate_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_calibration_went_through_are_not_exchanged(tensor, walk, tree):
    """What came later was calibrated on them: days of work end in a refusal, and go on when the file is back."""
    source, output, run, expected = walk
    path = change(source, tensor)
    before = tree(output)
    with pytest.raises(
        ConversionError, match=r"holds other weights than when it was calibrated.*put it back"
    ) as caught:
        run()
    assert str(path) in str(caught.value) and tensor in str(caught.value)
    assert tree(output) == before
    change(source, tensor)  # flips it back
    assert run().jobs_resumed > 10
    assert tree(output) == expected


def test_weights_that_calibration_has_yet_to_reach_may_change(walk, tmp_path, tree):
    source, output, run, _ = walk
    change(source, "model.layers.2.mlp.experts.1.up_proj.weight")
    change(source, "lm_head.weight")
    assert run().jobs_resumed > 10
    run(tmp_path / "fresh")
    assert tree(output) == tree(tmp_path / "fresh")


def test_a_bit_of_a_shard_that_calibration_wrote(walk, tree):
    _, output, run, expected = walk
    shard = sorted(output.glob("*.safetensors"))[0]
    flip(shard, shard.stat().st_size // 4)
    run()
    assert tree(output) == expected


def test_a_state_whose_reports_are_damaged_is_computed_again(walk, tree):
    _, output, run, expected = walk
    path = output / "npuq" / "calibration" / "state.json"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0.0", b"0.5", 1).replace(b"1", b"2", 1))
    run()
    assert tree(output) == expected
