"""Run on every rank: load a model, compute logits, and write how many bytes of its shards the rank has in memory.

torchrun --nproc-per-node N mapping.py MODEL LAYOUT OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import npuq


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


def main() -> None:
    directory, layout, out = sys.argv[1:]
    torch.set_num_threads(1)
    model = npuq.load(directory, "cpu", parallel=layout)
    rank = model.engine.model.ops.group.rank
    loaded = resident(directory)
    if model.leads:
        vocabulary = model.engine.model.config.vocab_size
        tokens = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(1))[:200].tolist()
        list(model.logits([tokens, tokens[:1]]))
        model.close()
    else:
        model.follow()
    Path(out, f"{rank}.json").write_text(json.dumps({"loaded": loaded, "ran": resident(directory)}))


if __name__ == "__main__":
    main()
