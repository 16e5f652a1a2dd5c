"""Speed and memory of conversion, beside a plain copy of the same bytes, in memory and on disk.

    python benchmarks/convert.py                       /dev/shm (the program's own speed), then build/ (the disk's)
    python benchmarks/convert.py --directory build --experts 16 --source bf16 --method mse

Makes a checkpoint with one layer of random routed experts of DeepSeek-V3's size (hidden 7168, moe 2048) and converts it
to W4A8, into two shards (`--shards`): neighbouring shards are filled and hashed together, and real conversions write
dozens. Each round runs the conversion, then a plain sequential copy: read the source, write as many bytes as the
artifact has, sync. The conversion syncs too. Prints medians: GB/s of source; the ratio to the copy of the same
round, and its least and greatest; processor seconds a GB of source (other work disturbs these least: divided by the
workers, they are the time of a quiet machine); and peak anonymous memory of the process, torch included (the rest of
its resident memory is mapped files).

--profile adds a run with one worker for each method, and the seconds that its thread was in each part: reading, the
kernel, digests of what was read and written (XXH3), writing, and the shards' SHA-256. "other" is the rest of the run:
planning, Python between the parts, the last sync. On a busy machine, all parts grow alike: read the shares.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure.machine import as_json

from npuq.convert import convert_checkpoint
from npuq.convert.write.hashes import ShardHashes
from npuq.convert.write.shards import ShardFiles
from npuq.formats.digests import Digest
from npuq.formats.safetensors import encode_header
from npuq.formats.sources.weights import RowBytes
from npuq.native.binding import Quantizer, description

HIDDEN, WIDTH, BLOCK = 7168, 2048, 128
COPY_CHUNK = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--directory",
        type=Path,
        action="append",
        help="where source and artifact are written; default /dev/shm and build",
    )
    parser.add_argument("--experts", type=int, default=48, help="44 MB of FP8 source each")
    parser.add_argument("--source", choices=["fp8", "bf16"], default="fp8")
    parser.add_argument("--method", choices=["minmax", "mse"], action="append", help="default both")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--shards", type=int, default=2, help="output files of about the same size")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also the share of each part, in a run with one worker")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for directory in options.directory or [Path("/dev/shm"), Path("build")]:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="npuq-", dir=directory) as folder:
            source = Path(folder) / "source"
            write_source(source, options.experts, options.source)
            methods = options.method or ["minmax", "mse"]
            rows += [{"directory": str(directory), **measure(source, method, options)} for method in methods]
    if options.json:
        print(as_json({"kernels": description(), **vars(options), "rows": rows}))
        return
    print(f"{options.experts} experts in {options.source}, {options.workers} workers, {description()}")
    print("directory  method  source GB/s  copy GB/s  of copy (spread)  CPU s/GB  copy's  peak RSS  anonymous")
    for row in rows:
        low, high = row["of_copy_spread"]
        ratio = f"{row['of_copy']:4.2f} ({low:.2f}–{high:.2f})"
        print(
            f"{row['directory']:9}  {row['method']:6}  {row['source_bytes_per_s'] / 1e9:11.3f}  "
            f"{row['copy_bytes_per_s'] / 1e9:9.3f}  {ratio}  {row['cpu_s_per_gb']:8.2f}  "
            f"{row['copy_cpu_s_per_gb']:6.2f}  {row['peak_rss_bytes'] / 1e6:5.0f} MB  "
            f"{row['peak_anonymous_bytes'] / 1e6:6.0f} MB"
        )
    for row in rows if options.profile else []:
        parts = row["profile"]
        shares = ", ".join(f"{name} {seconds / sum(parts.values()):.0%}" for name, seconds in parts.items())
        print(f"{row['directory']} {row['method']}, one worker, {sum(parts.values()):.2f} s: {shares}")


def write_source(directory: Path, experts: int, kind: str) -> None:
    """Write a checkpoint of one MoE layer. The rest of the model is so small that experts are nearly all of it."""
    config = {
        "model_type": "deepseek_v3",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "n_routed_experts": experts,
        "n_shared_experts": 0,
        "num_experts_per_tok": 1,
        "first_k_dense_replace": 0,
        "vocab_size": 16,
        "max_position_embeddings": 64,
        "torch_dtype": "bfloat16",
    }
    if kind == "fp8":
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0."
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": _normal(16, HIDDEN),
        "model.norm.weight": _normal(HIDDEN),
        "lm_head.weight": _normal(16, HIDDEN),
        f"{layer}input_layernorm.weight": _normal(HIDDEN),
        f"{layer}post_attention_layernorm.weight": _normal(HIDDEN),
        f"{layer}self_attn.q_proj.weight": _normal(32, HIDDEN),
        f"{layer}self_attn.kv_a_proj_with_mqa.weight": _normal(32, HIDDEN),
        f"{layer}self_attn.kv_a_layernorm.weight": _normal(16),
        f"{layer}self_attn.kv_b_proj.weight": _normal(32, 16),
        f"{layer}self_attn.o_proj.weight": _normal(HIDDEN, 16),
        f"{layer}mlp.gate.weight": _normal(experts, HIDDEN),
        f"{layer}mlp.gate.e_score_correction_bias": torch.zeros(experts),
    }
    shapes = {"gate_proj": (WIDTH, HIDDEN), "up_proj": (WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    # One Gaussian matrix a projection, shared by all experts.
    for projection, shape in shapes.items():
        weight = _normal(*shape)
        blocks = weight.float().view(shape[0] // BLOCK, BLOCK, shape[1] // BLOCK, BLOCK)
        # As in DeepSeek's checkpoints: the largest weight of each block is e4m3's largest number.
        scale = blocks.abs().amax(dim=(1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(shape).to(torch.float8_e4m3fn)
        for expert in range(experts):
            name = f"{layer}mlp.experts.{expert}.{projection}.weight"
            tensors[name] = codes if kind == "fp8" else weight
            if kind == "fp8":
                tensors[name + "_scale_inv"] = scale
    codes_of = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
    entries = [(name, codes_of[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with (directory / "model.safetensors").open("wb") as file:
        file.write(encode_header(entries, {"format": "pt"}))
        for tensor in tensors.values():
            file.write(tensor.view(torch.uint8).numpy().data)
        os.fsync(file.fileno())


def measure(source: Path, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run rounds of copy and conversion into fresh files: medians of both."""
    rounds = []
    planned = convert_checkpoint(source, source.parent / "planned", method=method, dry_run=True)
    # Shards end between tensors: with room for one more, no small shard is left for the last tensor.
    shard_size = planned.output_bytes // options.shards + HIDDEN * WIDTH
    for number in range(options.rounds):
        output = source.parent / f"artifact-{method}-{number}"
        with memory_peaks() as peaks:
            started, cpu_started = time.perf_counter(), time.process_time()
            summary = convert_checkpoint(
                source, output, method=method, workers=options.workers, max_shard_size=shard_size
            )
            seconds, cpu = time.perf_counter() - started, time.process_time() - cpu_started
        shutil.rmtree(output)
        cpu_started = time.process_time()
        copied = plain_copy(source, source.parent / "copy", summary.output_bytes)
        copy_cpu = time.process_time() - cpu_started
        rounds.append((seconds, copied, dict(peaks), summary.source_bytes, cpu, copy_cpu))
    source_bytes = rounds[0][3]
    rates = [source_bytes / seconds for seconds, *_ in rounds]
    of_copy = [copied / seconds for seconds, copied, *_ in rounds]  # within a round: both met the same machine
    return {
        "method": method,
        **({"profile": profile(source, method, shard_size)} if options.profile else {}),
        "source_bytes": source_bytes,
        "source_bytes_per_s": statistics.median(rates),
        "source_bytes_per_s_spread": [min(rates), max(rates)],
        "copy_bytes_per_s": source_bytes / statistics.median(copied for _, copied, *_ in rounds),
        "of_copy": statistics.median(of_copy),
        "of_copy_spread": [min(of_copy), max(of_copy)],
        "cpu_s_per_gb": statistics.median(each[4] for each in rounds) / source_bytes * 1e9,
        "copy_cpu_s_per_gb": statistics.median(each[5] for each in rounds) / source_bytes * 1e9,
        "peak_rss_bytes": max(each[2]["VmRSS"] for each in rounds),
        "peak_anonymous_bytes": max(each[2]["RssAnon"] for each in rounds),
    }


# Part of a conversion → the function that does it. None calls another.
PARTS: dict[str, tuple[type, str]] = {
    "reading": (RowBytes, "read"),
    "kernel": (Quantizer, "run"),
    "digests": (Digest, "update"),
    "writing": (ShardFiles, "write"),
    "sha256": (ShardHashes, "job_done"),
}


def profile(source: Path, method: str, shard_size: int) -> dict[str, float]:
    """Seconds of a conversion with one worker, by part."""
    seconds = dict.fromkeys(PARTS, 0.0)

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                seconds[part] += time.perf_counter() - started

        return call

    output = source.parent / f"profiled-{method}"
    with ExitStack() as patches:
        for part, (owner, name) in PARTS.items():
            patches.enter_context(mock.patch.object(owner, name, timed(part, getattr(owner, name))))
        started = time.perf_counter()
        convert_checkpoint(source, output, method=method, workers=1, max_shard_size=shard_size)
        whole = time.perf_counter() - started
    shutil.rmtree(output)
    return {**seconds, "other": whole - sum(seconds.values())}


def plain_copy(source: Path, target: Path, size: int) -> float:
    """Time a copy: seconds to read the source in order, write `size` bytes and sync."""
    buffer = memoryview(bytearray(COPY_CHUNK))
    started = time.perf_counter()
    with target.open("wb", buffering=0) as output:
        left = size
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    left -= output.write(buffer[: min(count, left)])
        while left:
            left -= output.write(buffer[: min(COPY_CHUNK, left)])
        os.fsync(output.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


@contextmanager
def memory_peaks() -> Iterator[dict[str, int]]:
    """Peaks of VmRSS and RssAnon of this process within the context, in bytes, sampled every 25 ms."""
    peaks = {"VmRSS": 0, "RssAnon": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.025):
            with Path("/proc/self/status").open() as file:
                for line in file:
                    key, _, value = line.partition(":")
                    if key in peaks:
                        peaks[key] = max(peaks[key], int(value.split()[0]) * 1024)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()


def _normal(*shape: int) -> torch.Tensor:
    return (torch.randn(*shape) * 0.02).to(torch.bfloat16)


if __name__ == "__main__":
    main()
