"""Time of a step's sampling at a real vocabulary: the native kernel beside the same draw in numpy.

    python benchmarks/sampling.py --threads 2

Rows are model-like (a few likely tokens above a normal rest), flat, or all equal. A step samples a token for each sequence.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch

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
    options = parser.parse_args()
    ops = NativeOps(threads=options.threads)
    print(f"{options.sequences} sequences, {options.vocabulary} tokens, {options.threads} threads, {ops.pool.level}")
    print("| rows | request | native ms | numpy ms |\n|---|---|---:|---:|")
    for name, logits in rows(options.vocabulary, options.sequences).items():
        for request in REQUESTS:
            samplers = [Sampler(SamplingParams(seed=n, **request)) for n in range(options.sequences)]  # type: ignore[arg-type]
            best, drawn = {}, {}
            for position in range(options.rounds):
                for way, make in (("native", ops.logit_rows), ("numpy", host_rows)):
                    started = time.perf_counter()
                    found = zip(samplers, make(logits), strict=True)
                    drawn[way] = [sampler.next_token(row, range(position)).token for sampler, row in found]
                    best[way] = min(best.get(way, 9.0), time.perf_counter() - started)
                if drawn["native"] != drawn["numpy"]:
                    raise SystemExit(f"{name} {request}: the kernel drew other tokens than numpy")
            print(f"| {name} | {request} | {1000 * best['native']:.2f} | {1000 * best['numpy']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
