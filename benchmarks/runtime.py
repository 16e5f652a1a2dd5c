"""Decode and prefill of the runtime beside the machine's limits, llama.cpp and transformers, in one run.

    python benchmarks/runtime.py [--threads 2] [--rounds 3] [--json]
    python benchmarks/runtime.py --llama-cpp ENV/bin/python --transformers     # the peers too
    python benchmarks/runtime.py --context 4096,8192,32768 --layers 2 --llama-cpp ENV/bin/python    # one sequence

The model is random: 2.6 GB of DeepSeek-V3 in small, or with `--shape qwen3` 2.2 GB of Qwen3-30B-A3B's layers
(build/random-small-SHAPE, written once). `--llama-cpp` names the Python of an environment that has llama-cpp-python and
gguf: the same shape as a GGUF (build/random-small-SHAPE.gguf, written once), whose output matrix is in 8 bits, or with
`--llama-cpp-head BF16` in 16 as npuq's. `--transformers` runs the same shape in bfloat16. Limits: reading a buffer
larger than any cache, and torch's fastest int8 product on every shape and row count of the prefill.
Bytes that a step of many sequences reads are counted from the experts that its tokens were routed to.
All take turns with the same threads, a round each. Figures are medians over the rounds; ratios are computed within a
round first. On a machine with other work, `--threads 1 --cpu-time` leaves out the time of that work.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure.machine import as_json
from measure.machine_limits import Clock, Product, best, fastest_int8, random_int8, read_bandwidth
from measure.random_artifact import SHAPES, linears, make
from measure.rounds import Figures, Stopwatch, medians, summary, with_spread
from torch import Tensor

import npuq.runtime
from npuq.formats.schemes import Scheme
from npuq.models.config import ModelConfig
from npuq.native.binding import description
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams
from npuq.runtime.ops import MoeWeights, Ops

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=40, help="decode steps that are timed")
    parser.add_argument("--batch", type=int, default=16, help="sequences at once, beside one; 0: only one")
    parser.add_argument("--context", type=_lengths, default=[], help="lengths of prompts, in place of all else")
    parser.add_argument("--cpu-time", action="store_true", help="count processor time; with one thread only")
    parser.add_argument("--shape", choices=SHAPES, default="v3")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape's; without transformers")
    parser.add_argument("--seconds", type=float, default=3600, help="with --context: leave out what would end later")
    parser.add_argument("--model", type=Path, help="default: build/random-small-SHAPE")
    parser.add_argument("--llama-cpp", type=Path, metavar="PYTHON", help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--gguf", type=Path, help="default: build/random-small-SHAPE.gguf")
    parser.add_argument("--llama-cpp-head", choices=("Q8_0", "BF16"), default="Q8_0", help="npuq's head is BF16")
    parser.add_argument("--transformers", action="store_true", help="needs transformers and 4 GB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts the time of all threads together: use it with --threads 1")
    if options.transformers and options.shape != "v3":
        parser.error("--transformers knows the shape v3 alone")
    if options.layers and options.transformers:
        parser.error("--layers: transformers reads the whole model")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter

    layers = {"num_hidden_layers": options.layers} if options.layers else {}
    directory = options.model or BUILD / "-".join(["random-small", options.shape, *map(str, layers.values())])
    suffix = "-bf16-head" if options.llama_cpp_head == "BF16" else ""
    parts = ["random-small", options.shape, *map(str, layers.values())]
    gguf = options.gguf or BUILD / f"{'-'.join(parts)}{suffix}.gguf"
    if not (directory / "npuq" / "manifest.json").is_file():
        make(directory, {**SHAPES[options.shape], **layers})
    tokens = max([options.prompt, *options.context]) + 2 * options.tokens + 16
    batched = 2048 if options.context else max(1024, tokens)
    sizes = EngineConfig(max_num_seqs=64, max_num_batched_tokens=batched, prefix_cache=False)
    model = npuq.runtime.load(directory, "cpu", engine=sizes)
    peers: dict[str, list[str]] = {}
    shared = ["--threads", str(options.threads), "--tokens", str(options.tokens)]
    shared += [] if options.context else ["--prompt", str(options.prompt)]
    shared += ["--cpu-time"] if options.cpu_time else []
    if options.llama_cpp is not None:
        peer = [str(HERE / "peers/llama_cpp_runtime.py"), str(gguf), "--shape", options.shape]
        peer += ["--head", options.llama_cpp_head]
        peer += ["--layers", str(options.layers)] if options.layers else []
        peers["llama.cpp"] = [str(options.llama_cpp), *peer, *shared]
    if options.transformers:
        peers["transformers bf16"] = [
            sys.executable,
            str(HERE / "peers/transformers_runtime.py"),
            str(directory),
            *shared,
        ]

    if options.context:
        rounds_of = measure_contexts(model, peers, options, clock)
        found = {length: summary(rounds) for length, rounds in rounds_of.items() if rounds}
        if options.json:
            print(as_json({**vars(options), "peers": list(peers), "contexts": found}))
        else:
            print(context_table(found, list(peers)))
        return
    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        rounds.append(measure_round(model, peers, options.batch, options.prompt, options.tokens, clock))
    if options.json:
        print(as_json({**vars(options), "peers": list(peers), **summary(rounds)}))
    else:
        print(f"{description()}, {options.threads} threads{', processor time' if options.cpu_time else ''}, ", end="")
        print(f"medians of {options.rounds} rounds")
        print(table(medians(rounds), list(peers), options.batch, options.prompt))


def measure_round(
    model: LanguageModel, peers: dict[str, list[str]], batch: int, prompt: int, tokens: int, clock: Clock
) -> Figures:
    """Measure one round: rates in tokens/s, B/s and multiply-adds/s, and the ratios between them."""
    config = model.engine.model.config
    cached = sum(pool.channels for pool in model.engine.model.attention.pools(0))
    before = read_bandwidth(clock)
    product = fastest_int8(clock)
    ideal = int8_seconds(config, prompt, product, clock)
    one = measure(model, 1, prompt, tokens, clock)
    after = read_bandwidth(clock)  # other processes change it
    prefill, decode = one.prefill, one.decode
    found: Figures = {"read bandwidth": max(before, after), "npuq prefill": prefill, "npuq decode": decode}
    found["npuq prefill CPU ms"], found["npuq decode CPU ms"] = 1e3 * one.prefill_processor, 1e3 * one.decode_processor
    found["bytes of one"] = step_bytes(config, cached, 1, one)
    found["bandwidth of one"] = found["bytes of one"] * decode
    found["of bandwidth"] = found["bandwidth of one"] / found["read bandwidth"]
    if batch:
        many = measure(model, batch, prompt, tokens, clock)
        found["npuq batch"], found["batch experts"] = many.decode, many.experts
        found["batch gain"], found["npuq batch CPU ms"] = many.decode / decode, 1e3 * many.decode_processor
        found["bytes of batch"] = step_bytes(config, cached, batch, many)
        found["bandwidth of batch"] = found["bytes of batch"] * many.decode / batch
        found["batch bound"] = batch * found["bytes of one"] / found["bytes of batch"]
    found["int8 limit"] = integer_work(config, prompt) / ideal
    found["of int8"] = ideal * prefill / prompt
    for name, command in peers.items():
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found |= {f"{name} {what}": theirs[what] for what in ("prefill", "decode")}
        found |= {
            f"{name} prefill ratio": prefill / theirs["prefill"],
            f"{name} decode ratio": decode / theirs["decode"],
        }
    return found


def _lengths(text: str) -> list[int]:
    return [int(length) for length in text.split(",")]


def measure_contexts(
    model: LanguageModel, peers: dict[str, list[str]], options: argparse.Namespace, clock: Clock
) -> dict[int, list[Figures]]:
    """Measure every length in every round, the shortest first, as far as the time goes.

    A length that was not measured yet is expected to take the square of its ratio to the one before: attention does,
    and all else takes less. What would end after `options.seconds` is left out and named on stderr.
    """
    found: dict[int, list[Figures]] = {length: [] for length in sorted(options.context)}
    taken: dict[int, float] = {}
    started = time.perf_counter()
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        for length in found:
            shorter = max((done for done in taken if done <= length), default=None)
            expected = 0.0 if shorter is None else taken[shorter] * (length / shorter) ** 2
            now = time.perf_counter()
            if now - started + expected > options.seconds:
                print(f"left out: {length} tokens, about {expected:.0f} s (--seconds)", file=sys.stderr)
                continue
            found[length].append(measure_context(model, peers, length, options.tokens, clock))
            taken[length] = time.perf_counter() - now
    return found


def measure_context(
    model: LanguageModel, peers: dict[str, list[str]], length: int, tokens: int, clock: Clock
) -> Figures:
    """Measure one sequence behind a prompt of `length` tokens, in tokens/s. All caches have 16 bits a number."""
    print(f"{length} tokens", file=sys.stderr)
    one = measure(model, 1, length, tokens, clock)
    found: Figures = {"npuq prefill": one.prefill, "npuq decode": one.decode}
    found["npuq prefill CPU ms"], found["npuq decode CPU ms"] = 1e3 * one.prefill_processor, 1e3 * one.decode_processor
    for name, command in peers.items():
        done = subprocess.run([*command, "--prompt", str(length)], check=True, capture_output=True, text=True)
        theirs = json.loads(done.stdout)
        for what in ("prefill", "decode"):
            found[f"{name} {what}"], found[f"{name} {what} ratio"] = theirs[what], found[f"npuq {what}"] / theirs[what]
    return found


def context_table(found: dict[int, dict[str, Any]], peers: list[str]) -> str:
    lines = ["| context | npuq prefill | decode |" + "".join(f" {name} prefill | decode |" for name in peers)]
    lines.append("|---:" * (3 + 2 * len(peers)) + "|")
    for length, figures in found.items():
        line = f"| {length} | {with_spread(figures, 'npuq prefill', 1)} | {with_spread(figures, 'npuq decode')} |"
        for name in peers:
            for what in ("prefill", "decode"):
                line += f" {with_spread(figures, f'{name} {what}')}; {with_spread(figures, f'{name} {what} ratio')} × |"
        lines.append(line)
    return "\n".join(lines)


def table(found: Figures, peers: list[str], batch: int, prompt: int) -> str:
    lines = [
        f"limits: read {found['read bandwidth'] / 1e9:.1f} GB/s; torch int8 on the prefill's shapes "
        f"{found['int8 limit'] / 1e9:.0f} G multiply-adds/s; a token reads {found['bytes of one'] / 1e6:.0f} MB",
        f"{'':20} {f'prefill {prompt}':>12} {'decode':>10} {f'batch {batch}':>10}   tokens/s",
        f"{'npuq':20} {found['npuq prefill']:12.1f} {found['npuq decode']:10.2f}",
        f"{'  of the limit':20} {found['of int8']:12.2f} {found['of bandwidth']:10.2f}",
    ]
    if batch:
        lines[2] += f" {found['npuq batch']:10.1f}"
        lines[3] += f" {found['batch gain']:9.2f}×   (of int8, of bandwidth, of one sequence)"
        lines += [
            f"  {batch} sequences read {found['bytes of batch'] / 1e6:.0f} MB a step, of {found['batch experts']:.1f} "
            f"experts a layer: {found['batch bound']:.2f}× at the bandwidth of one",
            f"  one reads at {found['bandwidth of one'] / 1e9:.1f} GB/s, {batch} at "
            f"{found['bandwidth of batch'] / 1e9:.1f} GB/s",
        ]
    for name in peers:
        lines.append(f"{name:20} {found[f'{name} prefill']:12.1f} {found[f'{name} decode']:10.2f}")
        lines.append(
            f"{'  npuq is faster':20} {found[f'{name} prefill ratio']:11.2f}× {found[f'{name} decode ratio']:9.2f}×"
        )
    return "\n".join(lines)


@dataclass(frozen=True)
class Measured:
    """Tokens/s of prefill and decode (median step), and how many experts a layer ran and keys it read in a step;
    processor seconds of all threads for a token of the prompt and for a decode step."""

    prefill: float
    decode: float
    experts: float
    keys: float
    prefill_processor: float
    decode_processor: float


def measure(model: LanguageModel, batch: int, prompt: int, tokens: int, clock: Clock) -> Measured:
    """Measure `batch` random prompts together. Steps take turns: one is timed, in the next experts are counted."""
    generator = torch.Generator().manual_seed(batch)
    vocabulary = model.engine.model.config.vocab_size
    engine = model.engine
    params = SamplingParams(max_new_tokens=2 * tokens + 2, ignore_eos=True)
    warm = torch.randint(vocabulary, (min(prompt, 1024),), generator=generator).tolist()
    engine.add(warm, SamplingParams(max_new_tokens=3))
    while engine.scheduler.has_work:  # touches the mapped weights and the scratch memory once
        engine.step()
    prompts = torch.randint(vocabulary, (batch, prompt), generator=generator).tolist()
    sequences = [engine.add(tokens, params) for tokens in prompts]
    watch, started = Stopwatch(), clock()
    while not all(sequence.is_decoding for sequence in sequences):
        engine.step()
    prefill_processor = watch.processor / (batch * prompt)
    prefill = batch * prompt / (clock() - started)
    seconds: list[float] = []
    processor: list[float] = []
    experts: list[int] = []
    while not any(sequence.finish_reason for sequence in sequences):
        watch, started = Stopwatch(), clock()
        engine.step()
        seconds.append(clock() - started)
        processor.append(watch.processor)
        if not any(sequence.finish_reason for sequence in sequences):
            experts += count_experts(engine.model.ops, engine.step)
    while engine.scheduler.has_work:
        engine.step()
    keys = prompt + tokens
    decode, decode_processor = batch / statistics.median(seconds), statistics.median(processor)
    return Measured(prefill, decode, statistics.mean(experts), keys, prefill_processor, decode_processor)


def count_experts(ops: Ops, step: Callable[[], object]) -> list[int]:
    """Run a step: for each layer, the number of experts that got a token."""
    found: list[int] = []
    run = ops.routing.moe

    def counted(hidden: Tensor, weights: MoeWeights) -> Tensor:
        found.append(len(ops.routing.moe_gate(hidden, weights)[1].unique()))
        return run(hidden, weights)

    ops.routing.moe = counted  # type: ignore[method-assign]
    try:
        step()
    finally:
        ops.routing.moe = run  # type: ignore[method-assign]
    return found


def step_bytes(config: ModelConfig, cached: int, sequences: int, measured: Measured) -> int:
    """Bytes of weights, scales and cached keys that a decode step reads: of routed experts only those that it ran.

    cached: channels of a token in a layer's cache.
    """
    total = 2.0 * sequences * measured.keys * cached * config.num_hidden_layers
    for name, scheme, shape in linears(config):
        numel = torch.Size(shape).numel()
        if name == "model.embed_tokens.weight":
            numel = sequences * config.hidden_size
        size = 2.0 * numel if scheme is Scheme.FLOAT else numel * scheme.weight_bits / 8 + 4 * shape[0]
        if ".experts." in name:
            size *= measured.experts / config.n_routed_experts
        total += size
    return int(total)


def integer_shapes(config: ModelConfig, prompt: int) -> Counter[tuple[int, int, int]]:
    """Number of integer products [rows, K] × [K, N] of a prompt, by (rows, K, N); experts share its tokens evenly."""
    spread = prompt if config.moe is None else config.moe.tokens_of_expert(prompt)
    found: Counter[tuple[int, int, int]] = Counter()
    for name, scheme, shape in linears(config):
        if scheme is not Scheme.FLOAT:
            found[spread if ".experts." in name else prompt, shape[1], shape[0]] += 1
    return found


def integer_work(config: ModelConfig, prompt: int) -> int:
    """Multiply-adds of those products."""
    return sum(rows * k * n * count for (rows, k, n), count in integer_shapes(config, prompt).items())


# int8 rows [M, K] and weights [N, K] to a function that computes their product.
def int8_seconds(config: ModelConfig, prompt: int, product: Product, clock: Clock) -> float:
    """Seconds of `product` for them: the best of several runs of each shape."""
    total = 0.0
    for (rows, k, n), count in integer_shapes(config, prompt).items():
        total += count * best(product(*random_int8(rows, k, n)), 5, clock)
    return total


if __name__ == "__main__":
    main()
