"""Damaged artifacts under the sanitizers: a fixed number. `python tests/fuzz/artifacts.py` runs as many as asked."""

from __future__ import annotations

from pathlib import Path

import pytest
from artifacts import fuzz
from builds import COMPILER
from fuzz_bases import make_bases

pytestmark = pytest.mark.skipif(COMPILER is None, reason="gcc is not installed")

COUNT = 160


def test_damaged_artifacts_run_or_are_refused_in_a_line(tmp_path: Path) -> None:
    report = fuzz(make_bases(tmp_path / "bases"), tmp_path, first=0, count=COUNT)
    assert report.findings == []
    assert sum(report.outcomes.values()) == COUNT
    # Some are left whole, and some damage has no effect: those go through the kernels.
    assert report.outcomes["ran"] > COUNT / 10
    assert report.outcomes["refused"] > COUNT / 2
