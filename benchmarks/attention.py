"""Speed of attention's kernels beside torch's fastest bf16 and int8 products, in one run.

    python benchmarks/attention.py [--threads 2] [--rounds 5] [--only absorbed] [--level avx512bf16] [--json]

One token to a long cache and a causal prompt, in the shapes of DeepSeek-V3 (absorbed attention of 16 and 128 heads,
bf16 and int8 caches; decompressed attention) and of Qwen3-30B-A3B (32 heads that share 4). A round measures the
products, then each operator once; ratios are computed within a round, figures are medians. Of a prompt, half of the
square is counted. With `--threads 1` processor time is counted, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure.machine import as_json
from measure.machine_limits import Clock, best, fastest_int8, random_int8
from measure.rounds import Figures, summary, with_spread

from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import Decode, Keys, Lengths, Queries
from npuq.runtime.ops.grouped_attention import KEY, VALUE
from npuq.runtime.ops.native import NativeOps

SIDE, BLOCK = 1024, 128


@dataclass(frozen=True)
class Work:
    """A call: multiply-adds, bytes of keys and values, and whether its cache is of int8 codes."""

    name: str
    operations: int
    bytes: int
    int8: bool
    run: Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keys", type=int, default=32768, help="of a token")
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--only", default="", help="operators whose names have this in them")
    parser.add_argument("--level", help="default: the best of this CPU")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    clock = time.process_time if options.threads == 1 else time.perf_counter
    ops = NativeOps(torch.bfloat16, options.threads, options.level)
    works = [work for work in operators(ops, options.keys, options.prompt) if options.only in work.name]
    limits: list[Figures] = []
    rounds: list[list[Figures]] = []
    for _ in range(options.rounds):
        limits.append(products(clock))
        rounds.append([measure(work, limits[-1], clock) for work in works])
    found = [
        {"name": work.name, **summary(list(figures))}
        for work, figures in zip(works, zip(*rounds, strict=True), strict=True)
    ]
    if options.json:
        print(as_json({**vars(options), "level": ops.pool.level, "limits": summary(limits), "operators": found}))
        return
    print(table(ops.pool.level, options.threads, summary(limits), found))


def table(level: str, threads: int, limits: dict[str, Any], found: list[dict[str, Any]]) -> str:
    peaks = ", ".join(f"{name} {with_spread(limits, name, 0, 1e-9)}" for name in ("bf16", "int8"))
    lines = [f"{level}, {threads} threads; torch's products of {SIDE}³: {peaks} GMAC/s"]
    lines += ["| operator | GMAC/s | GB/s | of torch's bf16 | of torch's int8 |", "|---|---:|---:|---:|---:|"]
    for row in found:
        cells = [with_spread(row, "rate", 0, 1e-9), with_spread(row, "bytes", 1, 1e-9)]
        cells += [with_spread(row, name) for name in ("of bf16", "of int8")]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def products(clock: Clock) -> Figures:
    """Measure multiply-adds/s of torch's products of two square matrices."""
    x, weight = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    int8 = fastest_int8(clock)
    operands = random_int8(SIDE, SIDE, SIDE)
    x @ weight
    int8(*operands)()
    return {
        "bf16": SIDE**3 / best(lambda: x @ weight, 10, clock),
        "int8": SIDE**3 / best(int8(*operands), 10, clock),
    }


def measure(work: Work, limits: Figures, clock: Clock) -> Figures:
    work.run()
    seconds = best(work.run, 3 if work.operations > 1e10 else 8, clock)
    rate = work.operations / seconds
    return {
        "rate": rate,
        "bytes": work.bytes / seconds,
        "of bf16": rate / limits["bf16"],
        "of int8": rate / limits["int8"],
    }


def operators(ops: NativeOps, keys: int, prompt: int) -> list[Work]:
    found = [absorbed(ops, keys, heads, int8) for int8 in (False, True) for heads in (16, 128)]
    return [*found, decompressed(ops, prompt), grouped(ops, keys, 1), grouped(ops, prompt, prompt)]


def _decode(queries: int, keys: int) -> Decode:
    return Decode((queries,), (keys,), torch.arange(-(-keys // BLOCK), dtype=torch.int32)[None])


def absorbed(ops: NativeOps, keys: int, heads: int, int8: bool) -> Work:
    """One token of DeepSeek-V3's widths, with all heads or those of a small model."""
    latent, rope, decode = 512, 64, _decode(1, keys)
    pools = Pool("latent", latent, int8=True), Pool("rope", rope)
    scales = {"latent": torch.full((latent,), 0.03)} if int8 else {}
    cache = ops.caches.new(pools, decode.block_table.shape[1], BLOCK, scales)
    if int8:
        cache["latent"].tensor.random_(-100, 100)
    else:
        cache["latent"].tensor.normal_()
    cache["rope"].tensor.normal_()
    q_latent, q_rope = (torch.randn(1, heads, width).bfloat16() for width in (latent, rope))
    name = f"absorbed, one token, {heads} heads, {keys} keys, {'int8' if int8 else 'bf16'} cache"
    operations, read = keys * heads * (2 * latent + rope), keys * (latent * (1 if int8 else 2) + rope * 2)
    return Work(
        name, operations, read, int8, lambda: ops.mla.fused_infer_attention_paged(q_latent, q_rope, cache, decode, 0.01)
    )


def decompressed(ops: NativeOps, prompt: int) -> Work:
    """A prompt of DeepSeek-V3's widths. Keys and values are views of kv_b's outputs, as in a step."""
    heads, nope, rope, value = 16, 128, 64, 128
    q = torch.randn(prompt, heads, nope + rope).bfloat16()
    kv, k_rope = torch.randn(prompt, heads, nope + value).bfloat16(), torch.randn(prompt, rope).bfloat16()
    queries = Queries(q[..., :nope].contiguous(), q[..., nope:].contiguous())
    keys, lengths = Keys(kv[..., :nope], k_rope, kv[..., nope:]), Lengths([prompt], [prompt], causal=True)
    operations = prompt * prompt // 2 * heads * (nope + rope + value)
    return Work(
        f"decompressed, {prompt} causal queries, {heads} heads",
        operations,
        kv.nbytes,
        False,
        lambda: ops.mla.fused_infer_attention(queries, keys, lengths, 0.05),
    )


def grouped(ops: NativeOps, keys: int, queries: int) -> Work:
    """The last `queries` tokens of `keys`, on pages."""
    heads, kv_heads, width, decode = 32, 4, 128, _decode(queries, keys)
    pools = [Pool(name, kv_heads * width, layout="nd") for name in (KEY, VALUE)]
    cache = ops.caches.new(pools, decode.block_table.shape[1], BLOCK)
    for name in (KEY, VALUE):
        cache[name].tensor.normal_()
    query = torch.randn(queries, heads, width).bfloat16()
    pairs = keys if queries == 1 else keys * keys // 2
    what = f"one token, {keys} keys" if queries == 1 else f"{queries} causal queries"
    return Work(
        f"grouped, {what}, {heads} heads of {kv_heads}",
        pairs * heads * 2 * width,
        keys * 2 * kv_heads * width * 2,
        False,
        lambda: ops.gqa.fused_infer_attention_paged(query, cache, decode, 0.05),
    )


if __name__ == "__main__":
    main()
