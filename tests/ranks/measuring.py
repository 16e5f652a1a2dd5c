"""Run in one process, or on every rank of several: steps of several models, their logits and tokens written to a file.

    python measuring.py CASES OUT
    torchrun --nproc-per-node N measuring.py CASES OUT

CASES: a JSON list of `Case` objects. All processes of all launches must compute with one thread: sums of torch's own
products depend on their number.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import npuq
from npuq.runtime import EngineConfig, LanguageModel

BLOCK = 16
# Chunks of at most 40 tokens, beside decodes, in a cache that holds two of the sequences and some of a third.
PROMPT_LENGTHS = (4, 70, 33, 90)
SIZES = {"block_size": BLOCK, "max_num_seqs": 3, "max_num_batched_tokens": 40, "prefix_segment_tokens": 32}
BLOCKS = 9
NEW_TOKENS = 14


@dataclass(frozen=True)
class Case:
    """A model to run, and how. parallel: its layout over ranks; None for one process."""

    path: str
    backend: str = "cpu"
    dtype: str | None = None
    kv_cache_dtype: str = "auto"
    parallel: str | None = None

    def load(self) -> LanguageModel:
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        model = npuq.load(
            self.path,
            self.backend,
            dtype,
            engine=EngineConfig(kv_cache_bytes=16 << 20, **SIZES),
            kv_cache_dtype=self.kv_cache_dtype,
            parallel=self.parallel,
        )
        # The cache's bytes differ with the model: give the engine so many blocks, of which it has more.
        pool = model.engine.blocks
        assert pool.num_free > BLOCKS
        assert pool.allocate(pool.num_free - BLOCKS) is not None
        return model


def measure(model: LanguageModel) -> dict[str, Any]:
    """Logits of every step and tokens of greedy and seeded generation; logits of whole texts, one in chunks."""
    engine, steps = model.engine, []
    run = engine._run

    def recording(chunks: Any) -> tuple[Tensor, list[int]]:
        logits, order = run(chunks)
        steps.append(logits.clone())
        return logits, order

    engine._run = recording  # type: ignore[method-assign]
    generator = torch.Generator().manual_seed(11)
    vocabulary = engine.model.config.vocab_size
    prompts = [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    found: dict[str, Any] = {}
    for name, options in (("greedy", {"temperature": 0.0}), ("seeded", {"temperature": 1.0, "seed": 5})):
        done = model.generate(prompts, max_new_tokens=NEW_TOKENS, ignore_eos=True, **options)  # type: ignore[arg-type]
        found[name] = [completion.token_ids for completion in done]
    found["texts"] = list(model.logits([prompts[0], prompts[2], prompts[3]]))
    return {**found, "steps": steps, "preempted": engine.scheduler.num_preempted}


def main() -> None:
    torch.set_num_threads(1)
    cases = [Case(**each) for each in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))]
    models = [case.load() for case in cases]
    if not models[0].leads:
        for model in models:
            model.follow()
        return
    counts: list[list[int]] = []
    group = models[0].engine.model.ops.group
    if group.size > 1:
        gather = group.all_gather_rows

        def counting(rows: Tensor, shares: list[int]) -> Tensor:
            counts.append(list(shares))
            return gather(rows, shares)

        group.all_gather_rows = counting  # type: ignore[method-assign]
    results = [measure(model) for model in models]
    torch.save({"results": results, "counts": counts, "cases": [asdict(case) for case in cases]}, sys.argv[2])
    models[0].close()


if __name__ == "__main__":
    main()
