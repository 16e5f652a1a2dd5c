"""The table of docs/guide.md has every release, and the row that its script makes."""

from __future__ import annotations

import sys

from page_commands import ROOT

sys.path.append(str(ROOT / "benchmarks"))

import guide_table
from published import RELEASES

ROWS = [line for line in (ROOT / "docs/guide.md").read_text(encoding="utf-8").splitlines() if " GB | " in line]


def test_every_release_of_the_table_of_layouts_has_a_row() -> None:
    names = [row.split(" | ")[0].removeprefix("| ") for row in ROWS]
    planned = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
    assert names == [name for name in RELEASES if name in names]
    assert [name for name in RELEASES if f"| {name} |" in planned and name not in names] == []


def test_a_row_is_the_scripts() -> None:
    name = "DeepSeek-V2-Lite"
    assert guide_table._model(name, RELEASES[name]) == ROWS[list(RELEASES).index(name)]
