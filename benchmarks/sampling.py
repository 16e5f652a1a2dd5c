"""Time of a step's sampling at a real vocabulary: the native kernel beside the same draw in numpy.

    python benchmarks/sampling.py [--threads 2] [--rounds 5] [--json]

Rows are model-like (a few likely tokens above a normal rest), flat, or all equal. A step samples a token a sequence.
Kernel and numpy take turns, a round each; figures are medians, with the least and the greatest in the JSON.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from measure.machine import as_json
from measure.rounds import Figures, Stopwatch, summary, with_spread

from npuq.runtime import SamplingParams
from npuq.runtime.ops.native import NativeOps
from npuq.runtime.sampling.rows import host_rows
from npuq.runtime.sampling.sampler import Sampler

REQUESTS: tuple[dict[str, float], ...] = (
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "min_p": 0.05},
    {"temperature": 1.0, "logprobs": 5},
)


def rows(vocabulary: int, count: int) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(0)
    normal = generator.standard_normal((count, vocabulary)).astype(np.float32)
    model = normal * 2.5
    for row in model:
        row[generator.integers(0, vocabulary, 20)] += 12
    kinds = {"model-like": model, "flat": normal * 0.3, "equal": np.zeros_like(normal)}
    return {name: torch.from_numpy(values) for name, values in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=129280)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ops = NativeOps(threads=options.threads)
    found: list[dict[str, Any]] = []
    for name, logits in rows(options.vocabulary, options.sequences).items():
        for request in REQUESTS:
            rounds = measure(ops, logits, request, options.rounds)
            found.append({"rows": name, "request": request, **summary(rounds)})
    sizes = {"sequences": options.sequences, "vocabulary": options.vocabulary, "threads": options.threads}
    if options.json:
        print(as_json({**sizes, "level": ops.pool.level, "requests": found}))
        return
    print(f"{options.sequences} sequences, {options.vocabulary} tokens, {options.threads} threads, {ops.pool.level}")
    print("| rows | request | native ms | CPU ms | numpy ms | numpy of native |\n|---|---|---:|---:|---:|---:|")
    for row in found:
        columns = [with_spread(row, name) for name in ("native ms", "native CPU ms", "numpy ms", "numpy of native")]
        print(f"| {row['rows']} | {row['request']} | {' | '.join(columns)} |")


def measure(ops: NativeOps, logits: torch.Tensor, request: dict[str, float], rounds: int) -> list[Figures]:
    """Measure a step in each round, after one uncounted round. Raises SystemExit where both ways draw other tokens."""
    samplers = [Sampler(SamplingParams(seed=n, **request)) for n in range(len(logits))]  # type: ignore[arg-type]
    found: list[Figures] = []
    for position in range(rounds + 1):
        figures, drawn = {}, {}
        for way, make in (("native", ops.logit_rows), ("numpy", host_rows)):
            watch = Stopwatch()
            pairs = zip(samplers, make(logits), strict=True)
            drawn[way] = [sampler.next_token(row, range(position)).token for sampler, row in pairs]
            figures[f"{way} ms"], figures[f"{way} CPU ms"] = 1e3 * watch.wall, 1e3 * watch.processor
        if drawn["native"] != drawn["numpy"]:
            raise SystemExit(f"{request}: the kernel drew other tokens than numpy")
        figures["numpy of native"] = figures["numpy ms"] / figures["native ms"]
        found += [figures] if position else []
    return found


if __name__ == "__main__":
    main()
