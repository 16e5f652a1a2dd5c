"""The commands on damaged files, a fixed number of cases; `python tests/fuzz/commands.py` runs as many as asked."""

from __future__ import annotations

from pathlib import Path

from commands import fuzz
from fuzz_inputs import make_inputs

COUNT = 200


def test_damaged_files_are_read_or_refused_in_a_line(tmp_path: Path) -> None:
    make_inputs(tmp_path)
    report = fuzz(tmp_path, seed=0, first=0, count=COUNT)
    assert report.findings == []
    assert report.cases == COUNT
    # Some damage has no effect, and most is found.
    done, refused = (
        sum(count for what, count in report.outcomes.items() if what.endswith(end)) for end in ("done", "refused")
    )
    assert done > COUNT / 8
    assert refused > COUNT / 3
