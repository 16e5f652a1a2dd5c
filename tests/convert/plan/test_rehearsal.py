"""What is written at the end is tried before the work: what cannot be finished does not begin."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from calibrated import add_tokenizer, text

from npuq.convert import CalibrationText, convert_checkpoint
from npuq.convert.finish.finish import rehearse
from npuq.convert.plan.prepare import prepare
from npuq.errors import ArtifactError, CheckpointError
from npuq.verification import verify
from npuq.verification.evaluations import check_can_save

# The first two bytes happen to be UTF-8, the others are not.
MODEL_IN_GBK, SHOWN = b"\xc4\xa3\xd0\xcd", r"ģ\xd0\xcd"


@pytest.fixture
def refused_early(npuq, tmp_path):
    """Convert, and expect a refusal of one line before anything was written."""

    def run(source: object, *options: object) -> str:
        for more in ((), ("--dry-run",)):
            outcome = npuq("convert", source, tmp_path / "out", "--method", "minmax", *options, *more)
            assert (outcome.status, outcome.stdout) == (1, "")
            assert outcome.stderr.startswith("npuq: error: ") and outcome.stderr.count("\n") == 1
            assert not (tmp_path / "out").exists()
        return str(outcome.stderr)

    return run


def test_names_that_are_no_utf8(v3_source, tmp_path):
    """Of the source and the output, and of a calibration text: they end up in the artifact's files."""
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + MODEL_IN_GBK))
    shutil.copytree(v3_source, odd)
    summary = convert_checkpoint(odd, odd.with_name(f"{odd.name}-w4a8"))
    assert summary.status == "converted"
    odd.with_name(f"{odd.name}-w4a8").rename(tmp_path / "w4a8")
    assert verify(tmp_path / "w4a8", odd).ok
    manifest = json.loads((tmp_path / "w4a8" / "npuq" / "manifest.json").read_text())
    assert manifest["source"]["name"] == SHOWN
    assert f"# {SHOWN}, w4a8" in (tmp_path / "w4a8" / "README.md").read_text()


def test_a_calibration_text_whose_name_is_no_utf8(v3_source, tmp_path):
    source = Path(shutil.copytree(v3_source, tmp_path / "source"))
    add_tokenizer(source)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + MODEL_IN_GBK))
    odd.write_text(text(500))
    convert_checkpoint(source, tmp_path / "out", method="gptq", calibration=CalibrationText(odd, 4, 16))
    assert json.loads((tmp_path / "out" / "npuq" / "manifest.json").read_text())["calibration"]["name"] == SHOWN


@pytest.mark.parametrize("changed", [{"\ud800": 1}, {"note": ["a \udfff"]}, {"architectures": ["\udc00"]}], ids=ascii)
def test_half_a_surrogate_pair_in_the_config(changed, refused_early, make_checkpoint):
    source = make_checkpoint()
    edited = json.loads((source / "config.json").read_text()) | changed
    (source / "config.json").write_text(json.dumps(edited))
    assert "surrogate" in refused_early(source)


def test_half_a_surrogate_pair_in_the_name_of_a_tensor(refused_early, make_checkpoint):
    odd = "model.odd_name"
    source = make_checkpoint(shards=1, edit=lambda tensors: tensors.update({odd: tensors["model.norm.weight"].clone()}))
    path = source / "model.safetensors"
    # As long as the escape is in JSON, so that no offset changes.
    path.write_bytes(path.read_bytes().replace(odd.encode(), rb"model.od\ud800"))
    assert "surrogate U+D800" in refused_early(source)


@pytest.mark.parametrize("name", [b"tokenizer_\xff.json", b"a\nb.py", b"tokenizer\x1b[2J.json"])
def test_side_files_that_no_manifest_can_name(name, refused_early, make_checkpoint):
    source = make_checkpoint()
    Path(os.fsdecode(os.fsencode(source) + b"/" + name)).write_text("{}")
    line = refused_early(source)
    assert "rename" in line and str(source) in line and "\x1b" not in line


def test_side_files_that_cannot_be_read(refused_early, make_checkpoint, monkeypatch):
    source = make_checkpoint()
    before = os.open

    def denied(path, *arguments, **options):
        if str(path).endswith("LICENSE"):
            raise PermissionError(13, "Permission denied", str(path))
        return before(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    assert "LICENSE: cannot be read: Permission denied" in refused_early(source)


def test_a_side_file_that_never_ends(refused_early, make_checkpoint):
    source = make_checkpoint()
    os.mkfifo(source / "tokenizer.json")
    assert "tokenizer.json" in refused_early(source)


def test_rotary_tables_are_tried_before_the_work(refused_early, make_checkpoint, monkeypatch):
    def fails(rope, length):
        raise CheckpointError("config.json: tables of nothing")

    monkeypatch.setattr("npuq.models.rope.inverse_frequencies", fails)
    assert "tables of nothing" in refused_early(make_checkpoint())


def test_the_bytes_that_are_told(v3_source, tmp_path):
    """Everything beside the shards, to a percent: statistics and hashes are not known yet."""
    prepared = prepare(v3_source, "w4a8", "minmax", 60_000)
    told = rehearse(prepared)
    prepared.checkpoint.close()
    convert_checkpoint(v3_source, tmp_path / "out", recipe="w4a8", method="minmax", max_shard_size=60_000)
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    written = sum(path.stat().st_size for path in files if not path.name.startswith("model-"))
    assert 0.9 * written < told < 1.1 * written


def test_what_is_left_over_is_no_failure(v3_source, v3_artifact, tmp_path, tree, npuq, monkeypatch):
    """The artifact is whole when its journal cannot be removed: that is said, and the exit status is 0."""
    unlink = Path.unlink

    def keeps(path, missing_ok=False):
        if path.name == "progress.jsonl":
            raise PermissionError(1, "Operation not permitted", str(path))
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", keeps)
    for _ in range(2):  # converted, then finished
        outcome = npuq(
            "convert",
            v3_source,
            tmp_path / "out",
            "--method",
            "minmax",
            "--max-shard-size",
            "60000",
            "--progress",
            "none",
        )
        assert outcome.status == 0
        assert outcome.stderr.splitlines()[-1].endswith(
            "progress.jsonl: is not needed any more, and cannot be removed: Operation not permitted"
        )
    assert tree(tmp_path / "out").items() >= tree(v3_artifact).items()


def test_a_card_that_cannot_be_read_is_said_before_an_evaluation(v3_artifact, tmp_path):
    artifact = Path(shutil.copytree(v3_artifact, tmp_path / "artifact"))
    check_can_save(artifact)
    (artifact / "README.md").write_bytes(b"\xff")
    with pytest.raises(ArtifactError, match=r"README\.md: is not UTF-8"):
        check_can_save(artifact)
