"""Time of a step's sampling at a real vocabulary: the native kernel beside the same draw in numpy.

    python benchmarks/sampling.py [--threads 2] [--rounds 5] [--json]

Rows are model-like (a few likely tokens above a normal rest), flat, or all equal. A step samples a token a sequence.
Kernel and numpy take turns, a round each; figures are medians, with the least and the greatest in the JSON.

Sampling's share of a step: the step is DeepSeek-V3's for as many sequences with no context. Its time is taken as that
of a plain read of its weights, so a real step is longer. It reads attention, dense and shared linears (a byte a
weight), the head (two), and of the routed experts (half a byte) those that the sequences are expected to choose.
Bandwidth is measured before the rounds of each request.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from measure.machine import as_json
from measure.machine_limits import read_bandwidth
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


def v3_step_bytes(sequences: int) -> float:
    """Bytes of weights that a decode step of DeepSeek-V3 reads. Experts are chosen independently, 8 of 256."""
    hidden, layers, dense_layers, vocabulary = 7168, 61, 3, 129280
    q, kv, o = hidden * 1536 + 1536 * 128 * 192, hidden * 576 + 2 * 512 * 128 * 256, 128 * 128 * hidden  # kv_b in bf16
    expert = 3 * hidden * 2048
    chosen = 256 * (1 - (1 - 8 / 256) ** sequences)
    dense = dense_layers * 3 * hidden * 18432
    return (
        layers * (q + kv + o)
        + dense
        + (layers - dense_layers) * (expert + chosen * expert / 2)
        + 2 * vocabulary * hidden
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=129280)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ops = NativeOps(threads=options.threads)
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []
    nbytes = v3_step_bytes(options.sequences)
    for name, logits in rows(options.vocabulary, options.sequences).items():
        for request in REQUESTS:
            rounds = measure(ops, logits, request, options.rounds, nbytes)
            found.append({"rows": name, "request": request, **summary(rounds)})
    sizes = {"sequences": options.sequences, "vocabulary": options.vocabulary, "threads": options.threads}
    if options.json:
        print(as_json({**sizes, "level": ops.pool.level, "requests": found}))
        return
    print(f"{options.sequences} sequences, {options.vocabulary} tokens, {options.threads} threads, {ops.pool.level}")
    print(
        f"a step of DeepSeek-V3 reads {nbytes / 1e9:.0f} GB: {with_spread(found[0], 'V3 step ms', 0)} ms by plain read"
    )
    print("| rows | request | native ms | CPU ms | % of V3's step | numpy ms | numpy of native |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for row in found:
        names = "native ms", "native CPU ms", "% of V3's step", "numpy ms", "numpy of native"
        columns = [with_spread(row, name) for name in names]
        print(f"| {row['rows']} | {row['request']} | {' | '.join(columns)} |")


def measure(
    ops: NativeOps, logits: torch.Tensor, request: dict[str, float], rounds: int, nbytes: float
) -> list[Figures]:
    """Measure a step in each round, after one uncounted round. Raises SystemExit where both ways draw other tokens."""
    samplers = [Sampler(SamplingParams(seed=n, **request)) for n in range(len(logits))]  # type: ignore[arg-type]
    found: list[Figures] = []
    step_ms = 1e3 * nbytes / read_bandwidth(time.perf_counter, passes=3)
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
        figures["V3 step ms"] = step_ms
        figures["% of V3's step"] = 100 * figures["native ms"] / (figures["V3 step ms"] + figures["native ms"])
        found += [figures] if position else []
    return found


if __name__ == "__main__":
    main()
