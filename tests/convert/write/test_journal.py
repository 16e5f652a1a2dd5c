"""The journal as hostile input: whatever it holds, a conversion goes on rightly or refuses in one line."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npuq.convert import convert_checkpoint
from npuq.convert.write.checked_lines import DamagedLineError, checked_line, line_content
from npuq.convert.write.journal import JobEntry, Journal
from npuq.errors import ConversionError, NpuqError
from npuq.inputs.files import FileStamp
from npuq.quant.weight_error import ErrorSums

OPTIONS: dict[str, Any] = {"method": "minmax", "max_shard_size": 60_000, "workers": 2}
ENTRY = JobEntry(ErrorSums(0.25, 3.0), bytes(range(16)), bytes(range(16, 32)))
STAMP = FileStamp(10, -5, 7, 1 << 63)


@pytest.fixture(scope="module")
def unfinished(rig, v3_source, tmp_path_factory) -> Path:
    """A directory in which all jobs are done and journaled, and nothing is finished."""
    output = tmp_path_factory.mktemp("unfinished") / "out"
    assert rig(v3_source, output, options=OPTIONS, kill_at=2, calls=["replace", "rename"])["killed"]
    return output


def journal_of(output: Path) -> Path:
    return output / "npuq" / "progress.jsonl"


def new_journal(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "npuq" / "progress.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(Journal.first_line({"recipe": "w4a8"}))
    return path


def test_what_is_written_is_read_back(tmp_path):
    path = new_journal(tmp_path)
    journal = Journal.open(path)
    journal.settle([STAMP])
    journal.append({3: ENTRY, 7: ENTRY}, {})
    journal.append({}, {0: "a" * 64})
    del journal.record.jobs[3]
    journal.settle([STAMP])
    size = path.stat().st_size
    journal.settle([STAMP])
    assert path.stat().st_size == size  # nothing new to say
    journal.close()
    beginning, record = Journal.look(path)
    assert (beginning.identity, beginning.process) == ({"recipe": "w4a8"}, None)
    assert (record.jobs, record.hashes, record.sources) == ({7: ENTRY}, {0: "a" * 64}, (STAMP,))
    assert all(json.loads(line) for line in path.read_text().splitlines())  # JSON lines for whoever wants to look


def test_jobs_that_are_lost_after_they_were_made_again(tmp_path):
    path = new_journal(tmp_path)
    journal = Journal.open(path)
    for _ in range(2):
        journal.append({3: ENTRY}, {})
        del journal.record.jobs[3]
        journal.settle([])
    journal.close()
    assert Journal.look(path)[1].jobs == {}


@pytest.mark.parametrize("place", ["number", "digest", "structure", "end"])
def test_a_damaged_line_ends_the_journal(place, tmp_path):
    """Also where it would still be JSON that makes sense."""
    path = new_journal(tmp_path)
    journal = Journal.open(path)
    for index in range(3):
        journal.append({index: ENTRY}, {})
    journal.close()
    lines = path.read_bytes().split(b"\n")
    damage = {
        "number": lambda line: line.replace(b"0.25", b"0.75"),
        "digest": lambda line: line.replace(b"00", b"01", 1),
        "structure": lambda line: line.replace(b"[[", b"[{", 1),
        "end": lambda line: line[:-5],
    }
    lines[2] = damage[place](lines[2])
    path.write_bytes(b"\n".join(lines))
    assert list(Journal.look(path)[1].jobs) == [0]
    journal = Journal.open(path)
    journal.append({5: ENTRY}, {})
    journal.close()
    assert list(Journal.look(path)[1].jobs) == [0, 5]


NESTED: Any = []
for _ in range(500):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    "content",
    [
        {"jobs": 5},
        {"jobs": [[1, 2.0]]},
        {"jobs": [[-1, 0.0, 0.0, "00" * 16, "00" * 16]]},
        {"jobs": [[1.5, 0.0, 0.0, "00" * 16, "00" * 16]]},
        {"jobs": [[True, 0.0, 0.0, "00" * 16, "00" * 16]]},
        {"jobs": [[1, -1.0, 0.0, "00" * 16, "00" * 16]]},
        {"jobs": [[1, float("nan"), 0.0, "00" * 16, "00" * 16]]},
        {"jobs": [[1, 0.0, 0.0, "00" * 15, "00" * 16]]},
        {"jobs": [[1, 0.0, 0.0, None, "00" * 16]]},
        {"jobs": NESTED},
        {"hashes": [[0, "A" * 64]]},
        {"hashes": [["0", "a" * 64]]},
        {"hashes": {"0": "a"}},
        {"lost_jobs": [[1]]},
        {"sources": [[1, 2]]},
        {"sources": [[1, 2, 3, "4"]]},
        {"\ud800": 1},
    ],
    ids=lambda content: str(content)[:40],
)
def test_lines_that_no_journal_has(content, tmp_path):
    path = new_journal(tmp_path)
    intact = path.read_bytes()
    path.write_bytes(intact + checked_line(content) + checked_line({"lost_jobs": []}))
    _, record = Journal.look(path)
    assert not (record.jobs or record.hashes or record.sources)
    Journal.open(path).close()
    assert path.read_bytes() == intact


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"not ours\n",
        b"[]\n",
        b'{"npuq_conversion": 2}\n',
        b"[" * 100_000 + b"\n",
        checked_line({"npuq_conversion": 2, "identity": 5}),
        checked_line({"npuq_conversion": 2, "identity": {"recipe": 5}}),
        checked_line({"npuq_conversion": 2, "identity": {"recipe": "w4a8"}}).replace(b"w4", b"w8"),
        checked_line({"npuq_conversion": 2, "identity": {"recipe": "w4a8"}})[:-1],
    ],
    ids=lambda content: repr(content[:50]),
)
def test_first_lines_that_are_none(content, v3_source, tmp_path, tree):
    path = new_journal(tmp_path)
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=r"not a conversion journal, or a damaged one; choose another") as caught:
        convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path / "out") == {"npuq/progress.jsonl": content}


def fifo(path: Path) -> None:
    os.mkfifo(path)


def directory(path: Path) -> None:
    path.mkdir()


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [fifo, directory, endless])
def test_a_journal_that_is_no_file(make: Callable[[Path], None], v3_source, tmp_path):
    path = new_journal(tmp_path)
    path.unlink()
    make(path)
    for dry_run in (True, False):
        told = ""
        try:
            told = convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS, dry_run=dry_run).refusal or ""
        except NpuqError as error:
            told = str(error)
        assert "progress.jsonl" in told and "\n" not in told


@settings(max_examples=300)
@given(st.binary(max_size=300))
def test_any_bytes_are_content_or_damage(line: bytes) -> None:
    with suppress(DamagedLineError):
        assert isinstance(line_content(line), dict)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_mutated_journals(unfinished, v3_source, v3_artifact, tmp_path_factory, tree, draw: random.Random) -> None:
    """The artifact is the same to the byte, or nothing is touched and one line says why."""
    output = tmp_path_factory.mktemp("mutated") / "out"
    shutil.copytree(unfinished, output)
    path = journal_of(output)
    content = mutated(path.read_bytes(), draw)
    path.write_bytes(content)
    try:
        convert_checkpoint(v3_source, output, **OPTIONS)
    except NpuqError as error:
        assert "\n" not in str(error)
        assert path.read_bytes() == content
    else:
        assert tree(output) == tree(v3_artifact)
    finally:
        shutil.rmtree(output)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bytes that were flipped, cut, doubled or put in, or lines that say something else with a right checksum."""
    lines = content.splitlines(keepends=True)
    place = draw.randrange(len(lines))
    kind = draw.randrange(6)
    if kind == 0:
        position = draw.randrange(len(content))
        return content[:position] + bytes([content[position] ^ 1 << draw.randrange(8)]) + content[position + 1 :]
    if kind == 1:
        return content[: draw.randrange(len(content))]
    if kind == 2:
        position = draw.randrange(len(content))
        return content[:position] + draw.randbytes(draw.randrange(1, 50)) + content[position:]
    if kind == 3:
        draw.shuffle(lines)
        return b"".join(lines)
    if kind == 4:
        return b"".join([*lines[:place], *lines[draw.randrange(len(lines)) :]])
    values = draw.choice([[], 10**30, None, "x", [[5]], {"a": 1}, [[0, 0.5, 0.5, "11" * 16, "22" * 16]]])
    said = {draw.choice(["jobs", "hashes", "lost_jobs", "lost_hashes", "sources"]): values}
    return b"".join([*lines[:place], checked_line(said), *lines[place:]])


def test_jobs_and_shards_that_the_plan_does_not_have(unfinished, v3_source, v3_artifact, tmp_path, tree):
    output = tmp_path / "out"
    shutil.copytree(unfinished, output)
    with journal_of(output).open("ab") as file:
        file.write(checked_line({"jobs": [[10**30, 0.0, 0.0, "00" * 16, "00" * 16]]}))
        file.write(checked_line({"hashes": [[10**30, "a" * 64]]}))
    assert convert_checkpoint(v3_source, output, **OPTIONS).status == "converted"
    assert tree(output) == tree(v3_artifact)


def test_a_hash_of_a_shard_that_is_not_whole(rig, v3_source, v3_artifact, tmp_path, tree):
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, kill_at=30, slow=0.005, calls=["pwrite"])["killed"]
    with journal_of(output).open("ab") as file:
        file.write(checked_line({"hashes": [[shard, "a" * 64] for shard in range(6)]}))
    assert convert_checkpoint(v3_source, output, **OPTIONS).jobs_resumed > 0
    assert tree(output) == tree(v3_artifact)
