"""Print the table of docs/guide.md: what it takes to convert released models, and to serve the artifact.

python benchmarks/guide_table.py            print it
python benchmarks/guide_table.py --write    put it into the page

Sizes, disk and memory are those of `npuq convert --dry-run` on a checkpoint with every tensor of the release, whose
data are holes. Cards and layouts are those of `npuq doctor --plan`. Minutes are source bytes by the rates below, which
benchmarks/README.md has measured on other data.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/checkpoints"))
from measure.marked_tables import with_table
from published import RELEASES, write_release

import npuq
from npuq.models.config import ModelConfig
from npuq.recipes.reading import load_recipe
from npuq.runtime.attention.kinds import is_on_reference_alone
from npuq.runtime.memory.plan import Planner, recommended
from npuq.runtime.memory.weights import NpuMemory
from npuq.verification.memory_plan import stored_by_recipe

PAGE = Path(__file__).parents[1] / "docs/guide.md"
NAME = "python benchmarks/guide_table.py"
DEVICE_BYTES = 64_000_000_000
SERVERS = (1, 2, 4, 8, 16)

WORKERS = 2
"""Threads of the conversions that the rates are from."""
RATES = {"F8_E4M3": 0.77e9, "BF16": 1.6e9, "int4": 0.32e9, "FP4": 0.68e9}
"""Bytes of a source that two cores without VNNI convert in a second, method mse. FP8: as measured. bf16 has two bytes a
weight, Kimi's int4 half of one, at 0.8 of the rate of weights. FP4: 0.88 of FP8's, as on a machine with both."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/guide.md")
    table = "".join(f"{line}\n" for line in lines())
    if parser.parse_args().write:
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), NAME, table), encoding="utf-8")
    else:
        print(table, end="")


def lines() -> Iterator[str]:
    """The lines of the table, in Markdown."""
    columns = (
        "source | artifact | disk | disk from the hub | memory | minutes | 64 GB NPUs | npuq's ranks | cache tokens"
    )
    yield f"| model | {columns} |"
    yield f"|---|---|{'---:|' * 5}---:|---|---:|"
    for name, config in RELEASES.items():
        yield _model(name, config)


def _model(name: str, config: dict[str, Any]) -> str:
    with tempfile.TemporaryDirectory(prefix="npuq-") as folder:
        source = Path(folder) / name
        form = _form(config)
        write_release(source, config)
        plan = npuq.convert_checkpoint(source, Path(folder) / "out", dry_run=True, force=True, workers=WORKERS)
    ranks = _ranks(config)
    disk, window = plan.needed_disk_bytes / 1e9, 20.0
    memory = (plan.memory_bytes + plan.plan_bytes) / 1e9
    minutes = max(1, round(plan.source_bytes / RATES[form] / 60)) if form in RATES else "–"
    return (
        f"| {name} | {plan.source_bytes / 1e9:.0f} GB {form} | {plan.output_bytes / 1e9:.0f} GB | "
        f"{plan.source_bytes / 1e9 + disk:.0f} GB | {disk + window:.0f} GB | {memory:.2f} GB | {minutes} | {ranks} |"
    )


def _ranks(config: dict[str, Any]) -> str:
    """The columns of NPUs, layout and cache tokens; dashes for a model that npuq does not run on NPUs."""
    read = ModelConfig.from_dict(config)
    if is_on_reference_alone(read):
        return "– | – | –"
    try:
        model, _ = stored_by_recipe(read, load_recipe("w4a8"))
        planner = Planner(model, NpuMemory(), DEVICE_BYTES)
        plans = [recommended(planner.layouts(devices)) for devices in SERVERS]
    except npuq.NpuqError:
        return "– | – | –"
    fits = next((found for found in plans if found.fits), None)
    return "more than 16 | | " if fits is None else f"{fits.layout.ranks} | `{fits.layout}` | {fits.cache_tokens:,}"


def _form(config: dict[str, Any]) -> str:
    stated = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if not stated:
        return "BF16"
    if config.get("expert_dtype") == "fp4":
        return "FP4"
    return "F8_E4M3" if stated.get("quant_method") == "fp8" else "int4"


if __name__ == "__main__":
    main()
