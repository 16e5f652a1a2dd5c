"""Print the table of docs/scale.md: W4A8 artifacts of published shapes on one server of NPUs.

python benchmarks/scale_table.py            print it
python benchmarks/scale_table.py --write    put it into the page
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/checkpoints"))
from measure.marked_tables import with_table
from published import RUN_ON_NPUS

from npuq.models.config import ModelConfig
from npuq.recipes.reading import load_recipe
from npuq.runtime.memory.plan import Planner, RankPlan, recommended
from npuq.runtime.memory.weights import KINDS, NpuMemory
from npuq.runtime.ranks.layout import Layout
from npuq.verification.memory_plan import stored_by_recipe

PAGE = Path(__file__).parents[1] / "docs/scale.md"
NAME = "python benchmarks/scale_table.py"
DEVICE_BYTES = 64_000_000_000
SERVERS: Mapping[str, int] = {"A2, 8 devices": 8, "A3, 16 dies": 16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/scale.md")
    table = "".join(f"{line}\n" for line in lines())
    if parser.parse_args().write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), NAME, table), encoding="utf-8")
    else:
        print(table, end="")


def lines() -> Iterator[str]:
    """The lines of the table, in Markdown."""
    yield f"| model | on one device | server | layout | {' | '.join(KINDS)} | weights | step | cache tokens |"
    yield f"|---|---:|---|---|{'---:|' * (len(KINDS) + 3)}"
    for name, config in RUN_ON_NPUS.items():
        yield from _model(name, config)


def _model(name: str, config: dict[str, Any]) -> Iterator[str]:
    model, _ = stored_by_recipe(ModelConfig.from_dict(config), load_recipe("w4a8"))
    planner = Planner(model, NpuMemory(), DEVICE_BYTES)
    alone = f"{planner.rank(Layout()).total_weights.total / 1e9:.1f}"
    for server, devices in SERVERS.items():
        plan = recommended(planner.layouts(devices))
        first = f"{name} | {alone}" if devices == min(SERVERS.values()) else " | "
        yield f"| {first} | {server} | {_numbers(plan)} |"


def _numbers(plan: RankPlan) -> str:
    kinds = [f"{plan.weights[kind].total / 1e9:.2f}" for kind in KINDS]
    tokens = f"{plan.cache_tokens:,}" if plan.fits else "**does not fit**"
    sizes = f"{plan.total_weights.total / 1e9:.1f}", f"{plan.workspace.fixed / 1e9:.2f}"
    return " | ".join([str(plan.layout), *kinds, *sizes, tokens])


if __name__ == "__main__":
    main()
