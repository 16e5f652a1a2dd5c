"""Convert a checkpoint: plan it, convert it, check the artifact.

python examples/convert.py examples/tiny-deepseek-v3-fp8 build/careful --recipe examples/recipe.yaml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import npuq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="a directory of safetensors with its config.json")
    parser.add_argument("output", help="a new directory, or one that an interrupted run has left")
    parser.add_argument("--recipe", type=Path, help="a YAML file; without one experts become W4A8, the rest W8A8")
    options = parser.parse_args()

    # Writes nothing. `refusal` is the reason why a run would not start: a full disk, another artifact in its place.
    plan = npuq.convert_checkpoint(options.source, options.output, recipe=options.recipe, dry_run=True)
    print(f"{plan.jobs} weights, {plan.source_bytes:,} → {plan.output_bytes:,} bytes")
    print(f"needs {plan.needed_disk_bytes:,} bytes of disk and {plan.memory_bytes + plan.plan_bytes:,} of memory")
    if plan.refusal is not None:
        sys.exit(plan.refusal)

    # Killed at any moment, the same call continues. The number of workers does not change a byte.
    summary = npuq.convert_checkpoint(options.source, options.output, recipe=options.recipe)
    for role in summary.roles:
        if role["relative_error"] is not None:
            print(f"{role['role']:20} {role['scheme']:14} error {role['relative_error']:.2%}")

    verdict = npuq.verify(options.output, options.source)
    for problem in verdict.problems:
        print(f"problem: {problem}")
    print(f"{options.output}: {'ok' if verdict.ok else 'not whole'}, {verdict.linears} quantized linears")
    sys.exit(not verdict.ok)


if __name__ == "__main__":
    try:
        main()
    except npuq.NpuqError as error:  # every error of bad input is one, with a message of one line
        sys.exit(f"error: {error}")
