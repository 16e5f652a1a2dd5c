"""Whose the output directory is: npuq continues its own work, and touches nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from npuq.convert import convert_checkpoint
from npuq.convert.write.journal import Journal
from npuq.convert.write.output import claim
from npuq.errors import ArtifactError, CheckpointError, ConversionError
from npuq.formats.checkpoint import Checkpoint
from npuq.formats.output_files import locked_directory

OPTIONS = {"method": "minmax", "max_shard_size": 60_000}


@pytest.fixture
def half_done(rig, v3_source, tmp_path):
    """An output directory whose conversion was killed halfway."""
    output = tmp_path / "half"
    assert rig(v3_source, output, options=OPTIONS, kill_at=100, slow=0.001, calls=["pwrite"])["killed"]
    return output


def test_finished_with_the_same_arguments_does_nothing(v3_source, v3_artifact, tree):
    before = tree(v3_artifact)
    stamps = {path: path.stat().st_mtime_ns for path in v3_artifact.rglob("*")}
    summary = convert_checkpoint(v3_source, v3_artifact, **OPTIONS)
    assert summary.status == "finished" and summary.jobs_resumed == summary.jobs
    assert tree(v3_artifact) == before
    assert {path: path.stat().st_mtime_ns for path in v3_artifact.rglob("*")} == stamps


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"recipe": "w8a8"}, ["recipe (w4a8 ", "w8a8"]),
        ({"method": "mse"}, ["method (minmax there, mse now)"]),
        ({"max_shard_size": 70_000}, ["maximum shard size (60000 there, 70000 now)"]),
    ],
)
@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_other_arguments_are_refused_and_nothing_is_touched(
    changed, said, state, v3_source, v3_artifact, half_done, tree
):
    output = half_done if state == "unfinished" else v3_artifact
    before = tree(output)
    with pytest.raises(ConversionError) as caught:
        convert_checkpoint(v3_source, output, **(OPTIONS | changed))
    message = str(caught.value)
    assert str(output) in message and state in message
    assert "same arguments as before, or another output directory" in message
    for words in said:
        assert words in message
    assert tree(output) == before


def test_another_source_is_refused(make_checkpoint, half_done):
    other = make_checkpoint(fp8_block=16, config={"rms_norm_eps": 1e-5})
    with pytest.raises(ConversionError, match="source config or tensors"):
        convert_checkpoint(other, half_done, **OPTIONS)


def test_a_directory_with_other_things_is_refused(v3_source, tmp_path, tree):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ConversionError, match="is not empty and holds no conversion of npuq's; choose an empty"):
        convert_checkpoint(v3_source, tmp_path, **OPTIONS)
    assert tree(tmp_path) == {"thesis.txt": b"precious"}


def test_a_file_in_the_way_is_refused(v3_source, tmp_path):
    (tmp_path / "out").write_text("precious")
    with pytest.raises(ConversionError, match="exists and is not a directory"):
        convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("inner", ["", "sub/dir"])
def test_output_inside_the_source_is_refused(inner, v3_source, tree):
    before = tree(v3_source)
    with pytest.raises(ConversionError, match="lies inside the source checkpoint"):
        convert_checkpoint(v3_source, v3_source / inner, **OPTIONS)
    assert tree(v3_source) == before


def test_a_place_that_room_does_not_mend(v3_source, tmp_path):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "file" / "out", tmp_path / "dangling"):
        with pytest.raises(ConversionError, match=f"{output}.*choose an output that can be written"):
            convert_checkpoint(v3_source, output, **OPTIONS)


@pytest.mark.parametrize("name", [".", "npuq", "npuq/progress.jsonl"])
def test_a_dry_run_refuses_what_cannot_be_continued(name, v3_source, half_done, monkeypatch):
    """Root may write everywhere: the system's answer is exchanged."""
    access = os.access

    def answer(path: Path, mode: int) -> bool:
        return access(path, mode) and not (Path(path) == half_done / name and mode & os.W_OK)

    monkeypatch.setattr(os, "access", answer)
    refusal = convert_checkpoint(v3_source, half_done, dry_run=True, **OPTIONS).refusal
    assert refusal is not None and f"{half_done / name}: cannot be written: Permission denied; choose" in refusal
    with pytest.raises(ConversionError, match="Permission denied"):
        convert_checkpoint(v3_source, half_done, **OPTIONS)


def test_what_is_unfinished_is_called_so(half_done):
    with pytest.raises(CheckpointError, match="an unfinished conversion; run the same `npuq convert` again"):
        Checkpoint.open(half_done)


def test_what_a_user_should_know_before_hours_are_spent(make_checkpoint, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "target: npuq\nrules: [{names: '*.q_b_prj.*', scheme: w8a8}, {layers: 9-12, scheme: w8a8}, {scheme: w8a8}]"
    )
    source = make_checkpoint()
    (source / "tokenizer.model").unlink()
    notes = convert_checkpoint(source, tmp_path / "out", recipe=recipe, dry_run=True).notes
    assert sum("speaks of no weight" in note for note in notes) == 2
    assert any("rule 1 speaks" in note for note in notes) and any("rule 2 speaks" in note for note in notes)
    assert any("it has no tokenizer" in note for note in notes)
    (source / "tokenizer.model").touch()
    assert not any("tokenizer" in note for note in convert_checkpoint(source, tmp_path / "out", dry_run=True).notes)


def test_a_machine_without_kernels_is_told(v3_source, tmp_path, monkeypatch, npuq):
    """Once, at the start, where anything is quantized at all."""
    said = "takes about 40 times as long"
    monkeypatch.setattr("npuq.convert.plan.summary.library", object)
    assert said not in npuq("convert", v3_source, tmp_path / "with", "--method", "minmax").stderr
    monkeypatch.setattr("npuq.convert.plan.summary.library", lambda: None)
    outcome = npuq("convert", v3_source, tmp_path / "without", "--method", "minmax")
    assert outcome.status == 0 and outcome.stderr.count(said) == 1 and outcome.stderr.index(said) < 100
    assert said in npuq("convert", v3_source, tmp_path / "dry", "--dry-run").stdout
    assert said not in npuq("convert", v3_source, tmp_path / "float", "--recipe", "float").stderr


def test_files_that_others_put_beside_stay(v3_source, half_done):
    (half_done / "notes.txt").write_text("mine")
    convert_checkpoint(v3_source, half_done, **OPTIONS)
    assert (half_done / "notes.txt").read_text() == "mine"


def test_a_second_conversion_into_the_same_directory_is_refused(v3_source, half_done):
    with (half_done / "npuq" / "progress.jsonl").open() as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(ConversionError, match="another npuq is converting into it right now"):
            convert_checkpoint(v3_source, half_done, **OPTIONS)


def test_of_two_conversions_that_start_at_once_one_makes_the_journal(tmp_path):
    """The second has found no journal yet; the first writes one before the second gets to it."""
    own = tmp_path / "out" / "npuq"
    own.mkdir(parents=True)
    first, second = ({"recipe": name} for name in ("first", "second"))
    with ThreadPoolExecutor(1) as pool:
        with locked_directory(own):
            late = pool.submit(claim, tmp_path / "out", second)
            time.sleep(0.1)
            assert not late.done()
            (own / "progress.jsonl").write_bytes(Journal.first_line(first))
        with pytest.raises(ConversionError, match=r"recipe \(first there, second now\)"):
            late.result(timeout=10)
    assert (own / "progress.jsonl").read_bytes() == Journal.first_line(first)


def test_a_finished_artifact_that_lost_a_file_is_not_called_finished(v3_source, tmp_path):
    convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)
    (tmp_path / "out" / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-00002-of-00006\.safetensors.*convert again"):
        convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", '{"format_version": 1}'),
        ("manifest.json", '{"format_version": 1, "conversion": [], "files": []}'),
        ("report.json", "{"),
    ],
)
def test_a_finished_artifact_with_a_damaged_manifest_or_report_is_refused(name, content, v3_source, tmp_path):
    convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)
    (tmp_path / "out" / "npuq" / name).write_text(content)
    with pytest.raises(ArtifactError, match=r"damaged|not valid JSON"):
        convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)


def test_a_journal_that_is_none_is_refused(v3_source, tmp_path):
    (tmp_path / "out" / "npuq").mkdir(parents=True)
    (tmp_path / "out" / "npuq" / "progress.jsonl").write_text("not ours\n")
    with pytest.raises(ConversionError, match="not a conversion journal"):
        convert_checkpoint(v3_source, tmp_path / "out", **OPTIONS)


def test_a_journal_of_another_format_is_refused(v3_source, half_done):
    journal = half_done / "npuq" / "progress.jsonl"
    lines = journal.read_text().splitlines()
    lines[0] = json.dumps(json.loads(lines[0]) | {"npuq_conversion": 99})
    journal.write_text("\n".join(lines) + "\n")
    with pytest.raises(ConversionError, match="written by another version of npuq"):
        convert_checkpoint(v3_source, half_done, **OPTIONS)


def test_dry_run_writes_nothing(v3_source, tmp_path):
    summary = convert_checkpoint(v3_source, tmp_path / "out", dry_run=True)
    assert summary.status == "planned" and not (tmp_path / "out").exists()
