"""A disk that refuses: one clear error at any point, nothing that looks finished, and the same command continues."""

from __future__ import annotations

import re

import pytest

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


@pytest.mark.parametrize("free", [10**6, 10**15])
def test_too_little_space_is_said_before_the_start(free, v3_source, tmp_path, npuq, monkeypatch):
    monkeypatch.setattr("npuq.convert.conversion.free_bytes", lambda output: free)
    outcome = npuq("convert", v3_source, tmp_path / "out", "--method", "minmax")
    assert outcome.status == 0
    assert ("warning" in outcome.stderr and "are free" in outcome.stderr) == (free == 10**6)
