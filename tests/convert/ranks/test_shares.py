"""Shares of a conversion, made in any order by any number of ranks: the bytes of one process."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue

import killing_ranks
import pytest

from npuq.convert import convert_checkpoint
from npuq.convert.conversion import Part
from npuq.convert.plan.prepare import prepare
from npuq.convert.ranks.run import Run
from npuq.convert.ranks.share import Share
from npuq.convert.write.output import claim
from npuq.errors import ConversionError
from npuq.progress import Silent

OPTIONS = {"method": "minmax", "max_shard_size": 60_000, "workers": 1}


@pytest.fixture(scope="module")
def expected(v3_source, tmp_path_factory, tree):
    output = tmp_path_factory.mktemp("whole") / "out"
    convert_checkpoint(v3_source, output, **OPTIONS)
    return tree(output)


def share(source: Path, output: Path, rank: int, size: int, **options):
    return convert_checkpoint(source, output, part=Share(rank, size), **OPTIONS | options)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_any_number_of_ranks_makes_the_same_bytes(size, v3_source, expected, tmp_path, tree):
    for rank in reversed(range(size)):
        assert share(v3_source, tmp_path / "out", rank, size).status == "share"
    assert convert_checkpoint(v3_source, tmp_path / "out", part=Part.FINISH, **OPTIONS).status == "converted"
    assert tree(tmp_path / "out") == expected
    again = [share(v3_source, tmp_path / "out", 0, size), convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)]
    assert {summary.status for summary in again} == {"finished"}
    assert tree(tmp_path / "out") == expected


def test_other_numbers_continue_and_one_process_ends_it(v3_source, expected, tmp_path, tree):
    output = tmp_path / "out"
    done = share(v3_source, output, 1, 2)
    again = share(v3_source, output, 1, 2)
    assert done.jobs_resumed == 0 < again.jobs_resumed
    assert 0 < share(v3_source, output, 2, 3).jobs_resumed < again.jobs_resumed
    planned = convert_checkpoint(v3_source, output, dry_run=True, **OPTIONS)
    assert (planned.output_state, planned.refusal) == ("unfinished", None)
    whole = convert_checkpoint(v3_source, output, **OPTIONS)
    assert whole.status == "converted" and whole.jobs_resumed == planned.jobs_resumed > again.jobs_resumed
    assert tree(output) == expected


def test_ranks_continue_what_one_process_began(rig, v3_source, expected, tmp_path, tree):
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, kill_at=150, slow=0.002)["killed"]
    shares = [share(v3_source, output, rank, 2) for rank in range(2)]
    assert sum(summary.jobs_resumed for summary in shares) > 0
    convert_checkpoint(v3_source, output, part=Part.FINISH, **OPTIONS)
    assert tree(output) == expected


def test_finish_names_what_is_missing(v3_source, tmp_path):
    output = tmp_path / "out"
    share(v3_source, output, 0, 3)
    with pytest.raises(ConversionError, match=r"are not finished: model-\d+-of-\d+\.safetensors \(0 of .*no rank"):
        convert_checkpoint(v3_source, output, part=Part.FINISH, **OPTIONS)
    share(v3_source, output, 1, 3)
    share(v3_source, output, 2, 3)
    lost = sorted(output.glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(ConversionError, match=rf"1 of \d+ shards .*{lost.name} .*rank \d of 3 had it last"):
        convert_checkpoint(v3_source, output, part=Part.FINISH, **OPTIONS)
    assert not (output / "npuq" / "manifest.json").exists()


def test_a_changed_shard_is_found_by_the_rank_that_continues(v3_source, expected, tmp_path, tree):
    output = tmp_path / "out"
    share(v3_source, output, 0, 2)
    damaged = sorted(output.glob("*.safetensors"))[0]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    for rank in (0, 1):
        share(v3_source, output, rank, 2)
    convert_checkpoint(v3_source, output, part=Part.FINISH, **OPTIONS)
    assert tree(output) == expected


def test_a_source_that_changed_between_ranks(make_checkpoint, tmp_path, tree):
    """--finish compares what other ranks read with what the files hold now."""
    source, output = make_checkpoint(), tmp_path / "out"
    share(source, output, 0, 2)
    share(source, output, 1, 2)
    make_checkpoint(seed=1)
    with pytest.raises(ConversionError, match="are not finished"):
        convert_checkpoint(source, output, part=Part.FINISH, **OPTIONS)
    for rank in (0, 1):
        share(source, output, rank, 2)
    convert_checkpoint(source, output, part=Part.FINISH, **OPTIONS)
    convert_checkpoint(source, tmp_path / "whole", **OPTIONS)
    assert tree(output) == tree(tmp_path / "whole")


def test_other_arguments_are_refused(v3_source, tmp_path):
    share(v3_source, tmp_path / "out", 0, 2)
    for part in (Share(1, 2), Part.FINISH, Part.WHOLE):
        with pytest.raises(ConversionError, match="unfinished conversion with another"):
            convert_checkpoint(v3_source, tmp_path / "out", part=part, **OPTIONS | {"method": "mse"})


def test_while_one_process_converts_no_rank_begins(v3_source, tmp_path):
    prepared = prepare(v3_source, None, "minmax", 60_000)
    prepared.checkpoint.close()
    journal = claim(tmp_path / "out", prepared.identity)
    try:
        with pytest.raises(ConversionError, match="another npuq is converting into it"):
            share(v3_source, tmp_path / "out", 0, 2)
    finally:
        journal.close()


class Notes(Silent):
    """A receiver of notes."""

    def __init__(self) -> None:
        self.notes: Queue[str] = Queue()

    def note(self, text: str, /) -> None:
        self.notes.put(text)


def test_while_a_rank_works_one_process_waits_for_its_claims(v3_source, expected, tmp_path, tree):
    """No lock is held here: claims alone tell, as on another machine."""
    prepared, output, progress = prepare(v3_source, None, "minmax", 60_000), tmp_path / "out", Notes()
    prepared.checkpoint.close()
    share(v3_source, output, 1, 2)
    with Run.begin(output, prepared.identity, Share(0, 2)) as run, ThreadPoolExecutor(1) as pool:
        run.take([0], prepared.plan, progress)
        whole = pool.submit(convert_checkpoint, v3_source, output, progress=progress, **OPTIONS)
        while "is being made by rank 0 of 2" not in progress.notes.get(timeout=60):
            pass
        assert not whole.done()
        run.end()
        assert whole.result(60).status == "converted"
    assert tree(output) == expected


def test_some_kills(tmp_path):
    """`killing_ranks.py` has more of them."""
    said: list[str] = []
    assert killing_ranks.campaign(killing_ranks.EXAMPLE, tmp_path, 6, seed=5, say=said.append) == [], said


def test_the_command_line(npuq, v3_source, expected, tmp_path, tree):
    output = tmp_path / "out"
    options = ("--method", "minmax", "--max-shard-size", "60000", "--quiet")
    for rank in range(2):
        outcome = npuq("convert", v3_source, output, "--shard-of", f"{rank}/2", *options)
        assert outcome.status == 0 and "--finish follows" in outcome.stdout
    (output / "npuq" / "download-1-of-2").mkdir()
    (output / "npuq" / "download-1-of-2" / f"00000-{'a' * 40}.0-9").write_text("left over")
    assert npuq("convert", v3_source, output, "--finish", *options).status == 0
    assert tree(output) == expected
    planned = npuq("convert", v3_source, tmp_path / "new", "--dry-run", "--ranks", "2", "--json", *options)
    assert json.loads(planned.stdout)["rank"].keys() == {
        *("ranks", "shards", "source_bytes", "memory_bytes", "expected_seconds")
    }
    shutil.rmtree(output)
    for wrong in (("--shard-of", "0/2", "--finish"), ("--finish", "--dry-run"), ("--ranks", "2")):
        assert npuq("convert", v3_source, output, *wrong).status == 2
    assert npuq("convert", v3_source, output, "--shard-of", "2/2").status == 1
    assert npuq("convert", v3_source, output, "--shard-of", "0/2", "--method", "gptq").status == 1
