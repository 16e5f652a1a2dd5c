"""Speed of the native kernels, level by level, beside the machine's own limits measured in the same run.

    python benchmarks/kernels.py [--threads 2] [--rounds 3] [--repeat 10] [--json]

Limits: copying and reading a buffer larger than any cache, and torch's fastest int8 matrix product on this machine.
Each figure of a round is the best of many short repetitions, so that other work on the machine disturbs it little. A
round measures the limits, then every level. Ratios are computed within a round; figures are medians over the rounds.
Shapes are those of a small DeepSeek-V3 of hidden size 2048 (decode, prefill) and of DeepSeek-V3 itself (conversion).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from measure.machine import as_json
from measure.machine_limits import best as best_of
from measure.machine_limits import fastest_int8, random_int8
from measure.rounds import Figures, summary, with_spread
from torch import Tensor

from npuq.formats.schemes import Scheme
from npuq.native import binding as native
from npuq.native.library import levels
from npuq.quant.stored_rows import BlockScale, StoredRows
from npuq.runtime.attention.pools import Pool
from npuq.runtime.ops import Decode, LinearPart, Quantized
from npuq.runtime.ops.native import NativeOps

HIDDEN, INTERMEDIATE, EXPERTS = 2048, 1408, 64
PROMPT, KEYS = 512, 32768
V3_HIDDEN, V3_INTERMEDIATE = 7168, 2048


@dataclass(frozen=True)
class Row:
    """One measured figure: `value` in `unit`, and `ratio` to the limit named `limit`."""

    level: str
    what: str
    value: float
    unit: str
    ratio: float
    limit: str


@dataclass(frozen=True)
class Limits:
    """Limits of the machine: bytes/s of reading (a sum) and copying (bytes read); multiply-adds/s of torch's fastest
    int8 product and of its float32 product."""

    read: float
    copy: float
    int8: float
    floats: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=10, help="of each figure in a round")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    weights = _Weights()
    limits: list[Figures] = []
    rounds: list[list[Row]] = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        limit, rows = measure_round(weights, options.threads, options.repeat)
        limits.append(asdict(limit))
        rounds.append(rows)
    of_machine = summary(limits)
    if options.json:
        print(as_json({"threads": options.threads, "limits": of_machine, "rows": merged(rounds)}))
        return
    read, copy, int8, floats = (of_machine["medians"][name] / 1e9 for name in ("read", "copy", "int8", "floats"))
    print(f"{options.threads} threads: read {read:.1f} GB/s, copy {copy:.1f} GB/s, ", end="")
    print(f"torch's products of {PROMPT} rows: int8 {int8:.0f}, float32 {floats:.0f} GMAC/s")
    for row in merged(rounds):
        ratio = f"{with_spread(row, 'ratio')} of {row['limit']}"
        print(f"{row['level']:11} {row['what']:44} {row['medians']['value']:8.1f} {row['unit']:7} {ratio}")


def measure_round(weights: _Weights, threads: int, repeat: int) -> tuple[Limits, list[Row]]:
    """Measure the limits, and every level."""
    limits, rows = measure_limits(repeat), []
    for level in levels():
        if level != "portable":
            rows += measure_products(weights, level, threads, repeat, limits)
            rows += measure_attention(level, threads, repeat, limits)
        rows += measure_conversion(level, repeat, limits)
    return limits, rows


def merged(rounds: list[list[Row]]) -> list[dict[str, Any]]:
    """The rows of all rounds: each with a summary of its value and its ratio."""
    found = []
    for same in zip(*rounds, strict=True):
        names = {name: getattr(same[0], name) for name in ("level", "what", "unit", "limit")}
        found.append({**names, **summary([{"value": row.value, "ratio": row.ratio} for row in same])})
    return found


def best(work: Callable[[], object], repeat: int) -> float:
    """Seconds of the fastest of `repeat` runs, after one uncounted run."""
    work()
    return best_of(work, repeat, time.perf_counter)


def measure_limits(repeat: int) -> Limits:
    """Measure the limits of the machine, with torch's threads."""
    source = torch.ones(48 << 20)
    target = torch.empty_like(source)
    read = source.nbytes / best(lambda: torch.sum(source), repeat)
    copy = source.nbytes / best(lambda: target.copy_(source), repeat)
    product = fastest_int8(time.perf_counter)
    seconds = best(product(*random_int8(PROMPT, HIDDEN, 2 * INTERMEDIATE)), repeat)
    x, weight = torch.randn(PROMPT, HIDDEN), torch.randn(HIDDEN, 2 * INTERMEDIATE)
    operations = PROMPT * HIDDEN * 2 * INTERMEDIATE
    return Limits(read, copy, operations / seconds, operations / best(lambda: x @ weight, repeat))


class _Weights:
    """Random stored weights: the gate|up experts of a layer (W4A8), a wide dense linear (W8A8), a head (bf16)."""

    def __init__(self) -> None:
        def part(scheme: Scheme, rows: int) -> LinearPart:
            stored = rows // 2 if scheme is Scheme.W4A8 else rows
            weight = torch.randint(-128, 128, (stored, HIDDEN), dtype=torch.int8)
            return LinearPart("random", scheme, weight, torch.rand(rows, 1))

        self.experts = [[part(Scheme.W4A8, INTERMEDIATE) for _ in range(2)] for _ in range(EXPERTS)]
        self.dense = part(Scheme.W8A8, 8 * INTERMEDIATE * 4)
        self.head = torch.randn(32768, HIDDEN).bfloat16()


def _rows(count: int) -> Quantized:
    return Quantized(torch.randint(-127, 128, (count, HIDDEN), dtype=torch.int8), torch.rand(count))


def measure_products(weights: _Weights, level: str, threads: int, repeat: int, limits: Limits) -> list[Row]:
    """Measure products of one token (bound by reading) and of a prompt (bound by arithmetic)."""
    ops = NativeOps(threads=threads, level=level)
    experts, dense = ops.weights.w4a8_experts(weights.experts), ops.weights.w8a8_linear([weights.dense])
    head = ops.weights.float_linear([weights.head])

    def read(what: str, nbytes: int, work: Callable[[], object]) -> Row:
        rate = nbytes / best(work, repeat)
        return Row(level, what, rate / 1e9, "GB/s", rate / limits.read, "read bandwidth")

    def compute(what: str, operations: int, work: Callable[[], object]) -> Row:
        rate = operations / best(work, max(3, repeat // 5))
        return Row(level, what, rate / 1e9, "GMAC/s", rate / limits.int8, "torch int8")

    one = torch.ones(EXPERTS, dtype=torch.int64)
    token, token_rows, x = _rows(1), _rows(EXPERTS), torch.randn(1, HIDDEN)
    spread = PROMPT * 6 // EXPERTS
    prompt, prompt_rows = _rows(PROMPT), _rows(EXPERTS * spread)
    expert_bytes, dense_rows = EXPERTS * INTERMEDIATE * HIDDEN, weights.dense.weight.shape[0]
    return [
        read(
            "W4A8 experts, one token each", expert_bytes, lambda: ops.products.grouped_matmul(token_rows, experts, one)
        ),
        read("W8A8, one token", dense_rows * HIDDEN, lambda: ops.products.linear(token, dense)),
        read("bf16 head, one token", weights.head.nbytes, lambda: ops.products.linear(x, head)),
        compute(
            f"W4A8 experts, {spread} tokens each",
            2 * expert_bytes * spread,
            lambda: ops.products.grouped_matmul(prompt_rows, experts, one * spread),
        ),
        compute(f"W8A8, {PROMPT} tokens", dense_rows * HIDDEN * PROMPT, lambda: ops.products.linear(prompt, dense)),
    ]


def measure_attention(level: str, threads: int, repeat: int, limits: Limits) -> list[Row]:
    """Measure attention of one token, 16 heads, to a long cache of DeepSeek-V3's width, in bfloat16 and int8."""
    ops, latent, rope, heads, block = NativeOps(torch.bfloat16, threads, level), 512, 64, 16, 128
    q_latent, q_rope = (torch.randn(1, heads, width).bfloat16() for width in (latent, rope))
    table = torch.arange(KEYS // block, dtype=torch.int32)[None]
    decode, operations, found = Decode((1,), (KEYS,), table), KEYS * heads * (2 * latent + rope), []
    for name, scales in (("bf16", {}), ("int8", {"latent": torch.full((latent,), 0.03)})):
        pools = Pool("latent", latent, int8=True), Pool("rope", rope)
        cache = ops.caches.new(pools, KEYS // block, block, scales)
        cache["latent"].tensor.random_(-100, 100)
        cache["rope"].tensor.normal_()
        attend = partial(ops.mla.fused_infer_attention_paged, q_latent, q_rope, cache, decode, 0.01)
        rate = operations / best(attend, max(3, repeat // 5))
        what = f"absorbed attention, {KEYS} keys, {name} cache"
        found.append(Row(level, what, rate / 1e9, "GMAC/s", rate / limits.floats, "torch float32"))
    return found


def measure_conversion(level: str, repeat: int, limits: Limits) -> list[Row]:
    """Measure conversion of FP8 rows of DeepSeek-V3's experts on one thread, in bytes of source."""
    found = []
    for what, columns in (("gate/up", V3_HIDDEN), ("down", V3_INTERMEDIATE)):
        stored = fp8_rows(256, columns)
        for name, bits, mse in (("int4 minmax", 4, False), ("int4 mse", 4, True), ("int8 mse", 8, True)):
            times = max(2, repeat // 5) if mse else repeat
            rate = stored.rows.numel() / best(lambda: native.quantize(stored, bits, mse, 1, level), times)  # noqa: B023
            found.append(Row(level, f"{name}, {what} rows, 1 thread", rate / 1e6, "MB/s", rate / limits.copy, "copy"))
    return found


def fp8_rows(rows: int, columns: int) -> StoredRows:
    """Gaussian weights in 128 × 128 blocks of e4m3, scaled so that the largest of each block is 448."""
    weight = torch.randn(rows, columns)
    blocks = weight.view(rows // 128, 128, columns // 128, 128)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    stored: Tensor = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return StoredRows(stored, BlockScale(scale, 0, 128, 128))


if __name__ == "__main__":
    main()
