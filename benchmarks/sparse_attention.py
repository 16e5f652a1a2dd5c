"""Speed of decoding with sparse attention beside dense attention on the same weights, by the length of the context.

    python benchmarks/sparse_attention.py [--model v32|glm] [--threads 2] [--cpu-time] [--repeat 5] [--json]

One layer's attention block, from its normed input to its output, for one token after a context. The weights are random
and have the published widths: linears W8A8, the indexer's float ones and kv_b bfloat16. `full` selects by itself;
`shared` attends to another layer's selection (GLM-5.2). Dense attention reads the cache in its own layout. The three
are measured in turns. Figures are medians of the repetitions; ratios are computed within a repetition first. The JSON
has the least and the greatest too. On a machine with other work, --cpu-time counts the processor's time of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure.machine import as_json
from measure.rounds import summary
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.runtime.attention.kind import AttentionKind
from npuq.runtime.attention.mla import MlaAttention
from npuq.runtime.attention.sparse_mla import SparseMlaAttention
from npuq.runtime.ops import Decode, IndexerConfig, LayerCache, LinearPart, MlaConfig, Positions, Step
from npuq.runtime.ops.native import NativeOps

CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
BLOCK = 128
KINDS = ("dense", "full", "shared")


@dataclass(frozen=True)
class Shape:
    """Published widths of a model's attention."""

    hidden: int
    mla: MlaConfig
    indexer: IndexerConfig


SHAPES = {
    "v32": Shape(7168, MlaConfig(128, 1536, 512, 128, 64, 128, 1e-6, 0.1), IndexerConfig(64, 128, 64, 2048, False)),
    "glm": Shape(6144, MlaConfig(64, 2048, 512, 192, 64, 256, 1e-5, 0.06), IndexerConfig(32, 128, 64, 2048, True)),
}


class RandomParts:
    """Random stored weights of a shape, by the parts of the family's table."""

    def __init__(self, shape: Shape):
        mla, indexer, hidden = shape.mla, shape.indexer, shape.hidden
        assert mla.q_lora_rank is not None
        q_lora, latent = mla.q_lora_rank, mla.kv_lora_rank
        self._shapes = {
            "q_a": (q_lora, hidden),
            "q_b": (mla.heads * mla.qk_head_dim, q_lora),
            "kv_a": (latent + mla.qk_rope_head_dim, hidden),
            "o": (hidden, mla.heads * mla.v_head_dim),
            "index_q": (indexer.n_heads * indexer.head_dim, q_lora),
            "index_k": (indexer.head_dim, hidden),
            "index_weights": (indexer.n_heads, hidden),
            "kv_b": (mla.heads * (mla.qk_nope_head_dim + mla.v_head_dim), latent),
            "q_a_norm": (q_lora,),
            "kv_a_norm": (latent,),
            "index_k_norm": (indexer.head_dim,),
            "index_k_norm_bias": (indexer.head_dim,),
        }

    def linear(self, part: str) -> LinearPart:
        outputs, inputs = self._shapes[part]
        if part in ("index_k", "index_weights"):
            return LinearPart(part, Scheme.FLOAT, self.tensor(part))
        codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
        return LinearPart(part, Scheme.W8A8, codes, torch.full((outputs, 1), inputs**-0.5 / 73))

    def tensor(self, part: str) -> Tensor:
        shape = self._shapes[part]
        return (torch.randn(shape) * shape[-1] ** -0.5 if len(shape) > 1 else torch.ones(shape)).bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="v32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    threads = 1 if arguments.cpu_time else arguments.threads
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    rows = measure(SHAPES[arguments.model], getattr(torch, arguments.dtype), threads, arguments.repeat, clock)
    if arguments.json:
        print(as_json({**vars(arguments), "threads": threads, "contexts": rows}))
        return
    print(f"{'context':>8} {'dense':>10} {'full':>10} {'shared':>10}   {'full':>7} {'shared':>7}")
    for context, row in rows.items():
        figures = row["medians"]
        print(
            f"{context:8} {figures['dense ms']:7.2f} ms {figures['full ms']:7.2f} ms {figures['shared ms']:7.2f} ms   "
            f"{figures['full speedup']:6.2f}× {figures['shared speedup']:6.2f}×"
        )


@torch.inference_mode()
def measure(
    shape: Shape, dtype: torch.dtype, threads: int, repeat: int, clock: Callable[[], float]
) -> dict[int, dict[str, Any]]:
    """Measure every context: milliseconds of one layer's attention block for one token, and how many times as fast as
    dense attention the others are."""
    torch.manual_seed(0)
    ops, parts = NativeOps(dtype, threads), RandomParts(shape)
    dense = MlaAttention(shape.mla)
    full = SparseMlaAttention(shape.mla, shape.indexer, (True,))
    shared = SparseMlaAttention(shape.mla, shape.indexer, (False,))
    kinds: list[AttentionKind] = [dense, full, shared]
    full_weights = full.load(0, parts, ops)
    weights = [full_weights.mla, full_weights, type(full_weights)(full_weights.mla, None)]
    caches = [random_cache(ops, kind) for kind in kinds]
    hidden = torch.randn(1, shape.hidden).to(dtype)
    found = {}
    for context in CONTEXTS:
        step = decode_step(ops, context, shape.mla.qk_rope_head_dim)
        selected = full.attend(hidden, weights[1], caches[1], step, ops).selected

        def run(number: int, step: Step = step, selected: Tensor | None = selected) -> None:
            kinds[number].attend(hidden, weights[number], caches[number], step, ops, selected)

        rounds = []
        with ops.one_thread():
            for number in range(repeat + 1):
                figures = {f"{name} ms": 1e3 * seconds(run, place, clock) for place, name in enumerate(KINDS)}
                for name in KINDS[1:]:
                    figures[f"{name} speedup"] = figures["dense ms"] / figures[f"{name} ms"]
                rounds += [figures] if number else []  # the first warms caches
        found[context] = summary(rounds)
    return found


def random_cache(ops: NativeOps, kind: AttentionKind) -> LayerCache:
    cache = ops.caches.new(kind.pools(0), CONTEXTS[-1] // BLOCK, BLOCK)
    for pages in cache.pages.values():
        pages.tensor.normal_()
    return cache


def decode_step(ops: NativeOps, context: int, rope_dim: int) -> Step:
    """One token at the end of a context."""
    angle = torch.randn(1, rope_dim)
    table = torch.arange(-(-context // BLOCK), dtype=torch.int32)[None]
    positions = Positions(torch.tensor([context - 1]), angle.cos().to(ops.dtype), angle.sin().to(ops.dtype))
    return Step(torch.zeros(1, dtype=torch.int64), positions, Decode((1,), (context,), table), None, None)


def seconds(run: Callable[[int], None], number: int, clock: Callable[[], float]) -> float:
    started = clock()
    run(number)
    return clock() - started


if __name__ == "__main__":
    main()
