"""Directories that somebody else filled: what lies in a file's place is refused at once when it is no file in them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from calibrated import add_tokenizer

from npuq.convert import convert_checkpoint
from npuq.errors import NpuqError
from npuq.report import read_facts
from npuq.runtime import load
from npuq.verification import inspect, verify

FILES = (
    "config.json",
    "generation_config.json",
    "model-00001-of-00001.safetensors",
    "model.safetensors.index.json",
    "npuq/manifest.json",
    "npuq/recipe.yaml",
    "npuq/report.json",
    "npuq/rope.safetensors",
    "quant_model_description.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
KINDS = ("fifo", "device", "outside", "nowhere", "itself", "directory")


@pytest.fixture(scope="module")
def whole(write: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    source = write(folder / "source", config={"qk_rope_head_dim": 16})
    add_tokenizer(source)
    convert_checkpoint(source, folder / "artifact", method="minmax")
    return folder / "artifact"


@pytest.fixture(autouse=True)
def no_waiting() -> Iterator[None]:
    """A read that waits for somebody to write ends the test."""

    def end(number: int, frame: FrameType | None) -> None:
        raise AssertionError("waits for a file")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def put(kind: str, path: Path, outside: Path) -> None:
    """Put something of a kind in a file's place."""
    path.rename(outside)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "outside":
        path.symlink_to(outside)
    elif kind == "nowhere":
        path.symlink_to("nowhere")
    elif kind == "itself":
        path.symlink_to(path.name)
    else:
        path.mkdir()


def read_everything(artifact: Path) -> list[str]:
    """What every reader of an artifact says against it."""
    found = list(verify(artifact).problems)
    return [*found, *filter(None, (told(read, artifact) for read in (inspect, read_facts, generate)))]


def told(read: Callable[[Path], object], artifact: Path) -> str:
    try:
        read(artifact)
    except NpuqError as error:
        return str(error)
    return ""


def generate(artifact: Path) -> None:
    load(artifact, "reference").generate("w1 w2", max_new_tokens=1)


def test_the_whole_one_is_read(whole: Path) -> None:
    assert all((whole / name).is_file() for name in FILES)
    assert read_everything(whole) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_what_is_no_file_of_the_artifact(name: str, kind: str, whole: Path, tmp_path: Path) -> None:
    artifact = Path(shutil.copytree(whole, tmp_path / "artifact"))
    put(kind, artifact / name, tmp_path / "outside")
    found = read_everything(artifact)
    assert any(name in line for line in found), found
    assert all(line.isprintable() for line in found)


@pytest.mark.parametrize("kind", ["fifo", "device", "outside"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "README.md", "LICENSE"])
def test_what_is_no_file_of_the_source(name: str, kind: str, whole: Path, v3_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(v3_source, tmp_path / "source"))
    (source / name).write_bytes((source / name).read_bytes() if (source / name).exists() else b"secret")
    put(kind, source / name, tmp_path / "outside")
    if name == "README.md":  # decoration, and no reason to stop
        convert_checkpoint(source, tmp_path / "out", method="minmax")
        assert "secret" not in (tmp_path / "out" / "README.md").read_text()
        return
    with pytest.raises(NpuqError, match=name):
        convert_checkpoint(source, tmp_path / "out", method="minmax")


def test_a_side_file_larger_than_any(v3_source: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(v3_source, tmp_path / "source"))
    with (source / "tokenizer.model").open("wb") as file:
        file.truncate(1 << 40)  # of holes
    with pytest.raises(NpuqError, match=r"tokenizer\.model: is larger than"):
        convert_checkpoint(source, tmp_path / "out", method="minmax")
