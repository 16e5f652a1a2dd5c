"""A disk that refuses: one clear error at any point, nothing that looks finished, and the same command continues."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from npuq.convert import convert_checkpoint

OPTIONS = {"method": "minmax", "max_shard_size": 60_000, "workers": 2}
CALLS = ["pwrite", "write", "ftruncate", "fdatasync", "fsync", "replace", "rename", "mkdir"]


def test_no_space_at_many_points(rig, v3_source, v3_artifact, tmp_path, tree):
    expected = tree(v3_artifact)
    calls = rig(v3_source, tmp_path / "undisturbed", options=OPTIONS, calls=CALLS)["calls"]
    points = [1, 2, 3, *range(5, calls - 60, 140), *range(calls - 60, calls - 4, 7), *range(calls - 4, calls + 1)]
    for point in points:
        output = tmp_path / str(point)
        answer = rig(v3_source, output, options=OPTIONS, fail_at=point, calls=CALLS)
        if "error" not in answer:
            continue  # the syncer's part of the calls varies: this run was done before
        assert answer["kind"] == "ConversionError" and answer["exit_code"] == 1
        assert "No space left on device" in answer["error"]
        assert "make room" in answer["error"] and "run the same command" in answer["error"]
        assert str(output) in answer["error"] and "\n" not in answer["error"]
        # A manifest may be there only when all that it vouches for is: then syncing the folder it lies in was refused.
        if whole := (output / "npuq" / "manifest.json").exists():
            assert expected.items() <= tree(output).items()
        assert rig(v3_source, output, options=OPTIONS)["summary"]["status"] == ("finished" if whole else "converted")
        assert tree(output) == expected


def test_a_limit_of_the_operating_system(rig, v3_source, v3_artifact, tmp_path, tree):
    """RLIMIT_FSIZE: the kernel itself refuses, not a stand-in."""
    answer = rig(v3_source, tmp_path / "out", options=OPTIONS, file_limit=40_000)
    assert answer["kind"] == "ConversionError"
    # Two neighbouring shards fill at the same time: either may be the first to reach the limit.
    assert re.search(r"/model-0000[12]-of-00006\.safetensors: .*File too large", answer["error"])
    rig(v3_source, tmp_path / "out", options=OPTIONS)
    assert tree(tmp_path / "out") == tree(v3_artifact)


def test_what_was_done_before_the_disk_filled_up_is_kept(rig, v3_source, tmp_path):
    answer = rig(v3_source, tmp_path / "out", options=OPTIONS, fail_at=200, calls=["pwrite"])
    assert "No space left" in answer["error"]
    assert rig(v3_source, tmp_path / "out", options=OPTIONS)["summary"]["jobs_resumed"] > 20


@pytest.fixture
def free(monkeypatch) -> Callable[[int], None]:
    """Set what the disk says is free."""
    return lambda nbytes: monkeypatch.setattr("npuq.convert.plan.space.free_bytes", lambda output: nbytes)


def test_too_little_space_is_refused_before_the_start(free, v3_source, tmp_path, npuq):
    free(10**5)
    for options in ((), ("--dry-run",)):
        outcome = npuq("convert", v3_source, tmp_path / "out", *options)
        assert outcome.status == 1
        line = outcome.stderr.splitlines()[-1]
        assert line.startswith("npuq: error: ") and "needs about" in line and "100 kB are free" in line
        assert "--force" in line
        assert ("disk:" in outcome.stdout) == bool(options)  # a dry run still says all that it knows
    assert not (tmp_path / "out").exists()
    as_json = npuq("convert", v3_source, tmp_path / "out", "--dry-run", "--json")
    assert as_json.status == 1 and "--force" in json.loads(as_json.stdout)["refusal"]


def test_who_knows_better_starts_all_the_same(free, v3_source, v3_artifact, tmp_path, npuq, tree):
    free(10**5)
    options = ("--method", "minmax", "--max-shard-size", "60000", "--force")
    assert npuq("convert", v3_source, tmp_path / "out", *options, "--dry-run").status == 0
    outcome = npuq("convert", v3_source, tmp_path / "out", *options)
    assert outcome.status == 0 and "warning: " in outcome.stderr and "are free" in outcome.stderr
    assert tree(tmp_path / "out") == tree(v3_artifact)


def test_enough_space(free, v3_source, tmp_path, npuq):
    summary = convert_checkpoint(v3_source, tmp_path / "probe", dry_run=True)
    free(summary.needed_disk_bytes - 1)
    assert convert_checkpoint(v3_source, tmp_path / "out", dry_run=True).refusal is not None
    free(summary.needed_disk_bytes)
    assert convert_checkpoint(v3_source, tmp_path / "out", dry_run=True).refusal is None
    assert npuq("convert", v3_source, tmp_path / "out").status == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert written <= summary.needed_disk_bytes < 1.2 * written


def test_what_is_there_takes_no_room_again(free, rig, v3_source, tmp_path):
    """All shards were written before the interruption: the rest needs next to nothing."""
    output = tmp_path / "out"
    assert rig(v3_source, output, options=OPTIONS, kill_at=2, calls=["replace", "rename"])["killed"]
    options = {"method": "minmax", "max_shard_size": 60_000}
    planned = convert_checkpoint(v3_source, output, dry_run=True, **options)
    assert planned.jobs_resumed == planned.jobs and planned.missing_disk_bytes < 0.2 * planned.needed_disk_bytes
    free(planned.missing_disk_bytes)
    assert convert_checkpoint(v3_source, output, **options).status == "converted"
