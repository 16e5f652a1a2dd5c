"""A model over ranks beside one process with as many threads: decode and prefill, in turns.

    python benchmarks/ranks.py [--ranks 2] [--threads 1] [--rounds 3] [--layers 3] [--json]

The model is random, DeepSeek-V3 in small (`random_artifact.py`) with so many layers. One process has ranks · threads
threads. Ranks on one machine share its memory and cores, so the difference is what ranks cost: gloo's exchanges, and
the work that every rank repeats. Figures are medians over the rounds: tokens a second, and the processor's milliseconds
that a decoded token takes on rank 0, which other work on the machine hardly changes. The JSON has the
ratio to one process of the same round too; for the processor that of all ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure.machine import as_json
from measure.random_artifact import SMALL_V3, make
from measure.rounds import summary, with_spread

BUILD = Path(__file__).resolve().parent.parent / "build"
PROMPT = 512
TOKENS = 32
BATCH = 16
KINDS = {"prefill": "prefill of 512", "decode": "decode", "batch": "16 sequences", "processor": "processor ms"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("MODEL", "LAYOUT"), help="(what the processes do)")
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    model = BUILD / f"random-small-v3-{options.layers}"
    if not (model / "npuq" / "manifest.json").is_file():
        make(model, {**SMALL_V3, "num_hidden_layers": options.layers})
    ranks = options.ranks
    layouts = (f"ep={ranks},tp=1", f"ep={ranks},tp={ranks}")
    settings = {"one process": (1, ""), **{layout: (ranks, layout) for layout in layouts}}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for name, (count, layout) in settings.items():
            found[name].append(run(model, count, layout, ranks * options.threads // count))
    for name, several in found.items():
        for each, alone in zip(several, found["one process"], strict=True):
            each |= {f"{kind} ratio": each[kind] / alone[kind] for kind in KINDS}
            each["processor ratio"] *= settings[name][0]  # of all ranks, which work alike
    settled = {name: summary(several) for name, several in found.items()}
    if options.json:
        sizes = {"ranks": ranks, "threads": options.threads, "layers": options.layers}
        print(as_json({**sizes, "settings": settled}))
        return
    for name, figures in settled.items():
        print(f"{name:16}" + ", ".join(f"{title} {with_spread(figures, kind, 1)}" for kind, title in KINDS.items()))


def run(model: Path, ranks: int, layout: str, threads: int) -> dict[str, float]:
    """Measure in processes of their own."""
    launcher = [] if ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    ended = subprocess.run(
        [sys.executable, *launcher, __file__, "--measure", str(model), layout],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    figures: dict[str, float] = json.loads(ended.stdout)
    return figures


def measure(path: str, layout: str) -> None:
    """Generate on this rank, and print figures on rank 0."""
    import torch

    import npuq

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = npuq.load(path, "cpu", parallel=layout or None)
    if not model.leads:
        model.follow()
        return
    generator = torch.Generator().manual_seed(1)
    vocabulary = model.engine.model.config.vocab_size
    prompts = [torch.randint(3, vocabulary, (PROMPT,), generator=generator).tolist() for _ in range(BATCH)]

    params = npuq.SamplingParams(max_new_tokens=TOKENS + 1, ignore_eos=True)
    engine = model.engine

    def generate(count: int, length: int) -> tuple[list[Any], float]:
        sequences = [engine.add(prompt[:length], params) for prompt in prompts[:count]]
        engine.step()
        started = time.process_time()
        while engine.scheduler.has_work:
            engine.step()
        return sequences, time.process_time() - started

    generate(1, 64)  # pages of the weights, threads, connections
    (one,), processor = generate(1, PROMPT)
    batch, _ = generate(BATCH, 16)
    figures = {
        "prefill": PROMPT / one.prefill_seconds,
        "decode": TOKENS / one.decode_seconds,
        "processor": 1e3 * processor / TOKENS,
        "batch": BATCH * TOKENS / max(each.decode_seconds for each in batch),
    }
    model.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
