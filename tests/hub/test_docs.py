"""The fault table of docs/hub.md is what the tests do."""

from __future__ import annotations

from pathlib import Path

import fault_tables
import pytest
from faults import Fault

DOCS = Path(__file__).parent.parent.parent / "docs" / "hub.md"


@pytest.mark.parametrize(
    ("activity", "faults"),
    [("push", fault_tables.PUSH), ("pull", fault_tables.PULL), ("convert", fault_tables.CONVERT)],
)
def test_every_fault_that_is_tested_is_listed_and_no_other(activity: str, faults: dict[str, Fault]) -> None:
    rows = [line.split("|")[1:4] for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    survived = {fault.strip() for where, fault, outcome in rows if where.strip() == activity and "survived" in outcome}
    assert survived == set(faults)
