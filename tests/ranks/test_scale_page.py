"""The table of docs/scale.md, and the numbers that its text repeats, are those of the code."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from published import V3

from npuq.models.config import ModelConfig
from npuq.recipes.reading import load_recipe
from npuq.verification.memory_plan import PlanLine, plan_memory, stored_by_recipe

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))

import scale_table  # noqa: E402
from measure import marked_tables  # noqa: E402

PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")


def test_the_table_is_the_codes() -> None:
    """`python benchmarks/scale_table.py --write` writes it anew."""
    table = "".join(f"{line}\n" for line in scale_table.lines())
    assert marked_tables.with_table(PAGE, scale_table.NAME, table) == PAGE


@pytest.fixture(scope="module")
def lines() -> dict[tuple[str, str], PlanLine]:
    model, stored = stored_by_recipe(ModelConfig.from_dict(V3), load_recipe("w4a8"))
    return {(line.server, line.layout): line for line in plan_memory(model, stored, 8, 64_000_000_000).lines}


def test_the_texts_numbers_of_deepseek_v3(lines: dict[tuple[str, str], PlanLine]) -> None:
    alone = lines["npuq", "ep=8,tp=1"].plan
    assert alone is not None
    (said,) = re.findall(r"`ep=8,tp=1`\) would need ([\d.]+) GB", PAGE)
    assert float(said) == round(alone.total_weights.total / 1e9, 1)
    groups = re.findall(r"`(dp=\d,tp=\d,ep)`[^|]*?([\d,]+) tokens", PAGE)
    assert len(groups) == 2
    for layout, tokens in groups:
        assert round(lines["vllm-ascend", layout].cache_tokens, -3) == int(tokens.replace(",", ""))


def test_the_least_that_a_server_of_8_must_hold() -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| DeepSeek-V3 |")]
    assert int(row.split("|")[-2].replace(",", "")) >= 32_768
