"""Run on every rank: load a model, run steps, and write the bytes that the rank has in memory, and those of its plan.

torchrun --nproc-per-node N mapping.py MODEL LAYOUT OUT [PROMPTS LENGTH]
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import npuq
from npuq.formats.checkpoint import Checkpoint
from npuq.recipes.reading import load_recipe
from npuq.runtime.memory.plan import Planner
from npuq.runtime.memory.weights import CpuMemory, weight_bytes
from npuq.runtime.memory.workspace import StepSizes
from npuq.runtime.ranks.layout import Layout
from npuq.verification.memory_plan import read_stored


def resident(directory: str) -> int:
    """Bytes of a directory's shards that are mapped and in this process's memory."""
    total, shard = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            shard = words[-1].startswith(directory) and words[-1].endswith(".safetensors")
        elif shard and words[0] == "Rss:":
            total += 1024 * int(words[1])
    return total


def own() -> int:
    """Bytes of memory of this process alone: no files."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:")]
    return 1024 * int(line.split()[1])


@contextmanager
def sampled(most: list[int]) -> Iterator[None]:
    """Put the most that `own` was within the block into `most`."""
    ended = threading.Event()

    def sample() -> None:
        while not ended.is_set():
            most[0] = max(most[0], own())
            time.sleep(0.002)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def planned(directory: str, layout: str, ranks: int, rank: int) -> dict[str, int]:
    """The plan's bytes for a rank, of its weights and of a step of npuq's default sizes."""
    chosen = Layout.parse(layout, ranks) if ranks > 1 else Layout()
    with Checkpoint.open(directory) as checkpoint:
        model, _ = read_stored(checkpoint, load_recipe("w4a8"))
    backend = CpuMemory()
    weights = weight_bytes(model, chosen.owned(model.config, rank), backend)
    # Every row has logits, where generation needs one a sequence.
    plan = Planner(model, backend, 1 << 40, StepSizes(logit_rows=StepSizes.max_num_batched_tokens)).rank(chosen)
    return {
        "mapped": sum(held.mapped for held in weights.values()),
        "copied": sum(held.copied for held in weights.values()),
        "step": plan.workspace.fixed,
    }


def main() -> None:
    directory, layout, out, *sizes = sys.argv[1:]
    prompts, length = map(int, sizes or ("4", "200"))
    torch.set_num_threads(1)
    before = own()
    model = npuq.load(directory, "cpu", parallel=layout)
    group = model.engine.model.ops.group
    loaded, held, most = resident(directory), own(), [0]
    with sampled(most):
        if model.leads:
            vocabulary = model.engine.model.config.vocab_size
            generator = torch.Generator().manual_seed(1)
            tokens = torch.randint(3, vocabulary, (prompts, length), generator=generator).tolist()
            for _ in model.logits([*tokens, tokens[0][:1]]):
                pass
            model.close()
        else:
            model.follow()
    found = {
        "loaded": loaded,
        "ran": resident(directory),
        "own_loaded": held - before,
        "own_most": most[0] - before,
        "planned": planned(directory, layout, group.size, group.rank),
    }
    Path(out, f"{group.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
