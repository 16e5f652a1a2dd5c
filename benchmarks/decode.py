"""Decode and prefill speed of the runtime, beside what the machine can do.

    python benchmarks/decode.py [MODEL]           MODEL: an artifact; default: a random one of 2.6 GB in build/
    python benchmarks/decode.py --batch 1 --batch 16 --prompt 512 --tokens 40

Prints for each batch size tokens/s of prefill and of decode and, for a batch of one, the bytes of weights that a
decoded token has to read, the rate at which it does, and that rate as a part of the read bandwidth measured in the
same run with the same threads. Steps are timed from schedule to sampled token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from random_artifact import SMALL_V3, linears, make

import npuq.runtime
from npuq.quant.model_config import ModelConfig
from npuq.quant.native import description
from npuq.quant.schemes import Scheme
from npuq.runtime import EngineConfig, LanguageModel, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--batch", type=int, action="append", help="sequences at once; default 1 and 16")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=40, help="decode steps that are timed")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", default="cpu")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model = _load(options.model or _random_artifact(), options.backend, options.prompt + options.tokens + 16)
    bandwidth = read_bandwidth()
    weights = bytes_per_token(model.engine.model.config)
    rows = []
    for batch in options.batch or [1, 16]:
        prefill, decode = measure(model, batch, options.prompt, options.tokens)
        row = {"batch": batch, "prefill_tokens_per_s": prefill, "decode_tokens_per_s": decode}
        if batch == 1:
            row["weight_bytes_per_token"] = weights
            row["weight_bytes_per_s"] = weights * decode
            row["of_read_bandwidth"] = weights * decode / bandwidth
        rows.append(row)
    if options.json:
        print(json.dumps({"threads": options.threads, "read_bytes_per_s": bandwidth, "rows": rows}, indent=2))
        return
    print(f"{model.backend}, {description()}, {options.threads} threads, read bandwidth {bandwidth / 1e9:.1f} GB/s")
    print("batch  prefill tok/s  decode tok/s  weights/token  read rate  of bandwidth")
    for row in rows:
        line = f"{row['batch']:5}  {row['prefill_tokens_per_s']:13.1f}  {row['decode_tokens_per_s']:12.2f}"
        if row["batch"] == 1:
            rate = f"{row['weight_bytes_per_s'] / 1e9:.1f} GB/s"
            line += f"  {weights / 1e6:10.0f} MB  {rate:>9}  {row['of_read_bandwidth']:12.2f}"
        print(line)


def measure(model: LanguageModel, batch: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Tokens/s of prefill and of decode (median step) for `batch` random prompts at once."""
    generator = torch.Generator().manual_seed(batch)
    vocabulary = model.engine.model.config.vocab_size
    engine = model.engine
    params = SamplingParams(max_new_tokens=tokens + 2, ignore_eos=True)
    engine.add(torch.randint(vocabulary, (8,), generator=generator).tolist(), SamplingParams(max_new_tokens=3))
    while engine.scheduler.has_work:  # touches the mapped weights once
        engine.step()
    for _ in range(batch):
        engine.add(torch.randint(vocabulary, (prompt,), generator=generator).tolist(), params)
    started, first = time.perf_counter(), 0
    while first < batch:
        first += len(engine.step())
    prefill = batch * prompt / (time.perf_counter() - started)
    seconds = []
    while engine.scheduler.has_work:
        started = time.perf_counter()
        new = engine.step()
        if len(new) == batch:
            seconds.append(time.perf_counter() - started)
    return prefill, batch / statistics.median(seconds)


def bytes_per_token(config: ModelConfig) -> int:
    """Bytes of weights and scales that one decoded token reads: of the routed experts only those it is sent to."""
    total = 0.0
    for name, scheme, shape in linears(config):
        numel = torch.Size(shape).numel()
        if name == "model.embed_tokens.weight":
            numel = config.hidden_size
        size = 2.0 * numel if scheme is Scheme.FLOAT else numel * scheme.weight_bits / 8 + 4 * shape[0]
        if ".experts." in name:
            size *= config.num_experts_per_tok / config.n_routed_experts
        total += size
    return int(total)


def read_bandwidth() -> float:
    """Bytes/s of summing a buffer far larger than any cache: the best of several passes."""
    buffer = torch.ones(256 << 20, dtype=torch.float32)
    best = float("inf")
    for _ in range(7):
        started = time.perf_counter()
        buffer.sum()
        best = min(best, time.perf_counter() - started)
    return buffer.nbytes / best


def _load(directory: Path, backend: str, tokens: int) -> LanguageModel:
    sizes = EngineConfig(max_num_seqs=64, max_num_batched_tokens=max(1024, tokens), kv_cache_bytes=2 << 30)
    return npuq.runtime.load(directory, backend, engine=sizes)


def _random_artifact() -> Path:
    directory = Path(__file__).resolve().parent.parent / "build" / "random-small-v3"
    if not (directory / "npuq" / "manifest.json").is_file():
        make(directory, SMALL_V3)
    return directory


if __name__ == "__main__":
    main()
