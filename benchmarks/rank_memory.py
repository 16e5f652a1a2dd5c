"""Memory of each rank of a random model on the CPU, beside the plan's figures.

    python benchmarks/rank_memory.py                 1, 2 and 4 ranks
    python benchmarks/rank_memory.py ep=2,tp=2

The model is `random_artifact.SMALL_V3` with a smaller vocabulary, 2.4 GB. Mapped is what a rank has in memory of the
model's shards; its own memory is what it does not share with files (RssAnon). Each launch computes the logits of four
texts of 1,000 tokens in steps of 1,024.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from measure.random_artifact import SMALL_V3, make

LAYOUTS = ("ep=1,tp=1", "ep=2,tp=1", "ep=2,tp=2", "ep=4,tp=4")
WORKER = Path(__file__).parents[1] / "tests/ranks/mapping.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", default=LAYOUTS)
    options = parser.parse_args()
    print(f"{'layout':12} rank  {'mapped: plan, seen':>20}  {'copied: plan, seen':>20}  {'at most: plan, seen':>20}")
    with tempfile.TemporaryDirectory(prefix="npuq-") as folder:
        model = Path(folder) / "model"
        make(model, {**SMALL_V3, "vocab_size": 8192})
        for layout in options.layouts:
            ranks = max(int(word.split("=")[1]) for word in layout.split(","))
            for rank, found in enumerate(measure(model, layout, ranks, Path(folder))):
                plan = found["planned"]
                most = plan["copied"] + plan["step"]
                pairs = [
                    (plan["mapped"], found["ran"]),
                    (plan["copied"], found["own_loaded"]),
                    (most, found["own_most"]),
                ]
                print(f"{layout:12} {rank:4}  " + "  ".join(f"{a / 1e6:7.0f}, {b / 1e6:5.0f} MB   " for a, b in pairs))


def measure(model: Path, layout: str, ranks: int, out: Path) -> list[dict[str, dict[str, int]]]:
    """Memory of each rank of a launch."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), str(WORKER)]
    arguments = [str(model), layout if ranks > 1 else "auto", str(out), "4", "1000"]
    subprocess.run([*command, *arguments], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


if __name__ == "__main__":
    main()
