"""A dry run of Kimi-K2.5 at its published size: 208,550 tensors, in time linear in their number."""

from __future__ import annotations

import time
from pathlib import Path

from kimi_k25_full import headers, write_headers

from npuq.convert import convert_checkpoint
from npuq.convert.conversion import Summary


def dry_run(directory: Path, experts: int) -> tuple[Summary, float]:
    source = write_headers(directory, experts)
    started = time.process_time()
    summary = convert_checkpoint(source, directory.with_name("out"), dry_run=True)
    return summary, time.process_time() - started


def test_what_208550_tensors_become_in_seconds(tmp_path: Path) -> None:
    assert len(list(headers())) == 208_550
    summary, seconds = dry_run(tmp_path / "full", 384)
    assert summary.jobs == 208_550 - 2 * 60 * 384 * 3
    by_role = {role["role"]: role for role in summary.roles}
    experts = by_role["routed_expert"]
    assert experts["tensors"] == 60 * 384 * 3 and experts["scheme"] == "W4A8_DYNAMIC"
    # Four bits a value, a bfloat16 scale for 32 of them, a shape.
    assert experts["source_bytes"] == 60 * 384 * 3 * (7168 * 2048 * (4 + 0.5) // 8 + 8)
    columns = 2 * 2048 * 3 + 7168 * 18
    assert experts["output_bytes"] == 60 * 384 * (3 * 7168 * 2048 // 2 + 4 * columns)
    assert (by_role["other"]["tensors"], by_role["other"]["scheme"]) == (335, "FLOAT")
    assert not any("unknown" in note or "int4" in note for note in summary.notes)
    assert seconds < 60
    _, fewer = dry_run(tmp_path / "fewer", 96)
    assert seconds < 8 * fewer  # four times as many tensors
