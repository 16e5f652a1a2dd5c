"""The file of tunings: what is written is read again, and nothing else is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from npuq.errors import BackendError
from npuq.runtime.ops.ascend.tuning.file import (
    MOST_CHOICES,
    MOST_DEVICES,
    Device,
    read_tuning,
    read_tunings,
    tuning_path,
    write_tuning,
)
from npuq.runtime.ops.ascend.tuning.grouped_matmul import Expectation, MatmulShape, Tuning, power_of_two

A2, A3 = Device("Ascend910B2", "8.5.0", "2.13.0"), Device("Ascend910_9392", "8.5.0", "2.13.0")
SMALL, LARGE = MatmulShape(4, 256, 7168, 4096, 8), MatmulShape(4, 256, 7168, 4096, 8192)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "npuq" / "tuning.json"


def test_without_a_file_nothing_is_told(path):
    assert read_tuning(path, A2) == Tuning()
    assert not path.parent.exists()


def test_choices_are_read_again_for_their_device_alone(path):
    write_tuning(path, A2, Tuning({SMALL: Expectation.MEAN, LARGE: Expectation.EXPANDED}))
    write_tuning(path, A3, Tuning({SMALL: Expectation.NONE}))
    assert read_tuning(path, A2).chosen == {SMALL: Expectation.MEAN, LARGE: Expectation.EXPANDED}
    assert read_tuning(path, A3).chosen == {SMALL: Expectation.NONE}
    for other in (Device(A2.name, "8.5.1", A2.torch_npu), Device(A2.name, A2.cann, "2.14.0")):
        assert read_tuning(path, other) == Tuning()


def test_a_later_measurement_replaces_its_shapes_and_keeps_others(path):
    write_tuning(path, A2, Tuning({SMALL: Expectation.MEAN, LARGE: Expectation.EXPANDED}))
    write_tuning(path, A2, Tuning({SMALL: Expectation.NONE}))
    assert read_tuning(path, A2).chosen == {SMALL: Expectation.NONE, LARGE: Expectation.EXPANDED}
    assert [each.name for each in path.parent.iterdir()] == ["tuning.json"]


def test_it_keeps_to_its_own_limits(path):
    many = {MatmulShape(4, 1 + index % 1000, 64 + index // 1000, 64, 1): Expectation.MEAN for index in range(5000)}
    for index in range(MOST_DEVICES + 2):
        write_tuning(path, Device(f"chip {index}", "", ""), Tuning({SMALL: Expectation.MEAN}))
    write_tuning(path, A2, Tuning(many))
    read = read_tunings(path)
    assert len(read) == MOST_DEVICES and len(read[A2].chosen) == MOST_CHOICES


def document(**changes: Any) -> dict[str, Any]:
    choice = {**vars(SMALL), "expect": "mean"}
    entry = {"device": A2.name, "cann": A2.cann, "torch_npu": A2.torch_npu, "choices": [choice]}
    if "entry" in changes:
        entry |= changes.pop("entry")
    if "choice" in changes:
        entry["choices"] = [choice | changes.pop("choice")]
    return {"schema": 1, "tunings": [entry]} | changes


HOSTILE = {
    "no JSON": "{",
    "no object": "[]",
    "deep": "[" * 100_000,
    "NaN": '{"schema": NaN}',
    "another schema": document(schema=2),
    "a schema that equals 1": document(schema=True),
    "tunings of another type": document(tunings={}),
    "tunings of texts": document(tunings=["x"]),
    "too many devices": document(tunings=[document()["tunings"][0]] * 65),
    "a device without a name": document(entry={"device": None}),
    "a long name": document(entry={"device": "x" * 101}),
    "choices of another type": document(entry={"choices": 3}),
    "too many choices": document(entry={"choices": [{}] * 4097}),
    "an empty choice": document(entry={"choices": [{}]}),
    "another expectation": document(choice={"expect": "2147483647"}),
    "a list for one": document(choice={"expect": ["mean"]}),
    "a number": document(choice={"expect": 4096}),
    "negative rows": document(choice={"rows": -8}),
    "odd rows": document(choice={"rows": 7}),
    "rows that are true": document(choice={"rows": True}),
    "rows in a text": document(choice={"rows": "8"}),
    "huge rows": document(choice={"rows": 1 << 70}),
    "three bits": document(choice={"bits": 3}),
    "too many experts": document(choice={"experts": 1025}),
    "a fraction": document(choice={"inputs": 7168.5}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_content_is_refused_in_a_line(path, name):
    content = HOSTILE[name]
    path.parent.mkdir(parents=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(BackendError) as refused:
        read_tuning(path, A2)
    assert str(path) in str(refused.value) and "\n" not in str(refused.value)
    # Measuring again replaces it.
    write_tuning(path, A2, Tuning({SMALL: Expectation.MEAN}))
    assert read_tuning(path, A2).chosen == {SMALL: Expectation.MEAN}


def test_the_document_is_taken_without_a_change(path):
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(document()))
    assert read_tuning(path, A2).chosen == {SMALL: Expectation.MEAN}


@pytest.mark.parametrize("kind", ["large", "a directory", "a pipe"])
def test_what_is_no_such_file_is_refused(path, kind):
    path.parent.mkdir(parents=True)
    if kind == "large":
        path.write_text(json.dumps(document()) + " " * (1 << 20))
    elif kind == "a directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(BackendError, match=r"tuning\.json"):
        read_tuning(path, A2)


def test_a_directory_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / "npuq").write_text("a file")
    with pytest.raises(BackendError, match="cannot be written"):
        write_tuning(tmp_path / "npuq" / "tuning.json", A2, Tuning())


def test_the_path_follows_the_cache_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    assert tuning_path({"XDG_CACHE_HOME": "/scratch"}) == Path("/scratch/npuq/tuning.json")
    assert (
        tuning_path({}) == tuning_path({"XDG_CACHE_HOME": "relative"}) == Path("/home/somebody/.cache/npuq/tuning.json")
    )


def test_a_path_that_cannot_be_is_no_file_and_no_home_is_told(monkeypatch):
    long = tuning_path({"XDG_CACHE_HOME": "/" + "long" * 100})
    assert read_tuning(long, A2) == Tuning()
    with pytest.raises(BackendError, match="cannot be written"):
        write_tuning(long, A2, Tuning())

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(BackendError, match="set HOME or XDG_CACHE_HOME"):
        tuning_path({})


@pytest.mark.parametrize(
    "expect,rows,told",
    [
        ("none", 64, None),
        ("mean", 64, [1]),
        ("mean", 257, [2]),
        ("mean", 1, [1]),
        ("mean", 0, None),
        ("expanded", 1025, [1025]),  # more than 4096 / 4
        ("expanded", 1024, None),  # the operator takes at most the rows of the call
    ],
)
def test_what_the_operator_is_told(expect, rows, told):
    assert Expectation(expect).value_for(rows, 256, 4096) == told


def test_rows_are_rounded_up():
    assert [power_of_two(count) for count in (1, 2, 3, 8, 9, 1000)] == [1, 2, 4, 8, 16, 1024]


def test_candidates_are_those_that_differ():
    assert Expectation.EXPANDED in LARGE.candidates and Expectation.EXPANDED not in SMALL.candidates
    assert Expectation.EXPANDED not in MatmulShape(8, 256, 7168, 4096, 8192).candidates
