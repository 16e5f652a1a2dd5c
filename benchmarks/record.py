"""Run the benchmarks one after the other, write one JSON, and the tables of README.md from it (`readme_tables.py`).

    bash benchmarks/all.sh                              everything: one to two hours on two quiet cores
    bash benchmarks/all.sh --quick                      a smoke run of some minutes, whose figures say nothing
    bash benchmarks/all.sh --only kernels sampling      these alone
    bash benchmarks/all.sh --llama-cpp ENV/bin/python --llm-compressor ENV/bin/python --transformers      with the peers

The JSON has the machine (processor, level, clock, cores, memory, read bandwidth, versions, commit, date), then of each
benchmark its command, wall and processor seconds, load and read bandwidth before it, and its own `--json`. It is
written anew after each benchmark, so that an interrupted run leaves what was done. A benchmark that fails leaves its
error, the others run, and the exit status is 1. A smoke run leaves README.md as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine
import readme_tables

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"

# Name → the script with its options, of a whole run and of a smoke run.
BENCHMARKS: dict[str, tuple[str, str]] = {
    "kernels": ("kernels.py --rounds 5", "kernels.py --rounds 2 --repeat 2"),
    "attention": ("attention.py --rounds 5", "attention.py --rounds 2 --keys 2048 --prompt 512"),
    "sampling": ("sampling.py --rounds 9", "sampling.py --rounds 2 --sequences 4"),
    "first-token": ("first_token.py --repeat 7", "first_token.py --repeat 2"),
    "convert": (
        "convert.py --rounds 5 --profile",
        "convert.py --rounds 2 --experts 16 --shards 1 --directory build",
    ),
    "calibrate": ("calibrate.py", "calibrate.py --only expert --tokens 128"),
    "runtime": (
        "runtime.py --rounds 5",
        "runtime.py --rounds 2 --layers 3 --prompt 64 --tokens 4 --batch 4",
    ),
    "runtime-qwen3": (
        "runtime.py --shape qwen3 --rounds 5",
        "runtime.py --shape qwen3 --rounds 2 --layers 2 --prompt 64 --tokens 4 --batch 0",
    ),
    "context": (
        "runtime.py --context 4096,8192,32768 --layers 2 --rounds 3 --tokens 20 --seconds 3000",
        "runtime.py --context 256,512 --rounds 2 --layers 3 --tokens 4",
    ),
    "sparse-attention-v32": (
        "sparse_attention.py --model v32 --repeat 12",
        "sparse_attention.py --model v32 --repeat 2",
    ),
    "sparse-attention-glm": (
        "sparse_attention.py --model glm --repeat 12",
        "sparse_attention.py --model glm --repeat 2",
    ),
    "ranks": ("ranks.py --rounds 5", "ranks.py --rounds 2"),
    "serve": ("serve.py --rounds 5", "serve.py --rounds 2 --tokens 8 --conversation 400"),
    "serve-random": ("serve.py --random --rounds 3 --prompt 100 --tokens 24", ""),
}
# Scripts whose `--threads` is the number of cores that a process may use.
THREADED = ("kernels.py", "attention.py", "sampling.py", "runtime.py", "sparse_attention.py", "serve.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--output", type=Path, default=BUILD / "benchmarks.json")
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="a Python with llama-cpp-python and gguf")
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="a Python with llmcompressor")
    parser.add_argument("--transformers", action="store_true", help="beside the random model of DeepSeek-V3's shape")
    options = parser.parse_args()
    record: dict[str, Any] = {
        "machine": machine.describe(),
        "quick": options.quick,
        "threads": options.threads,
        "benchmarks": {},
    }
    for name in options.only:
        if arguments := command(name, options):
            print(f"{name}: python benchmarks/{shlex.join(arguments)}", file=sys.stderr)
            record["benchmarks"][name] = run(arguments, options.threads)
            reads = [each["read_bytes_per_s"] for each in record["benchmarks"].values()]
            record["machine"] |= {"read_bytes_per_s": max(reads), "read_bytes_per_s_spread": [min(reads), max(reads)]}
            write(options.output, record)
    failed = [name for name, found in record["benchmarks"].items() if "error" in found]
    print(f"wrote {options.output}", file=sys.stderr)
    if not options.quick:
        readme_tables.write(record)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The script and options of a benchmark; nothing if a smoke run leaves it out."""
    arguments = shlex.split(BENCHMARKS[name][options.quick])
    if not arguments:
        return []
    script = arguments[0]
    if script in THREADED:
        arguments += ["--threads", str(options.threads)]
    if options.llama_cpp and not options.quick and (script == "runtime.py" or name == "serve-random"):
        arguments += ["--llama-cpp", options.llama_cpp]
    if options.transformers and not options.quick and name == "runtime":
        arguments += ["--transformers"]
    if options.llm_compressor and not options.quick and name == "calibrate":
        arguments += ["--llm-compressor", options.llm_compressor]
    return [*arguments, "--json"]


def run(arguments: Sequence[str], threads: int) -> dict[str, Any]:
    """Run a benchmark: its own JSON as "result", or the end of what it said as "error"; and what it took."""
    found: dict[str, Any] = {"command": f"python benchmarks/{shlex.join(arguments)}", "load": os.getloadavg()[0]}
    found["read_bytes_per_s"] = read_bandwidth(threads)
    started, before = time.perf_counter(), os.times()
    script = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
    last_lines: deque[str] = deque(maxlen=5)
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(script, stdout=output, stderr=subprocess.PIPE, text=True, cwd=HERE.parent) as process:
            assert process.stderr is not None
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
                last_lines.append(line)
        output.seek(0)
        answer = output.read()
    after = os.times()
    found["wall_s"] = time.perf_counter() - started
    found["cpu_s"] = after.children_user + after.children_system - before.children_user - before.children_system
    if process.returncode:
        return found | {"error": f"exit status {process.returncode}: {''.join(last_lines).strip()}"}
    try:
        return found | {"result": json.loads(answer)}
    except json.JSONDecodeError as error:
        return found | {"error": f"its --json is none: {error}"}


def read_bandwidth(threads: int) -> float:
    """Bytes/s of reading memory, in a process of its own, which gives its buffer back."""
    code = "import sys, time, torch, machine_limits; torch.set_num_threads(int(sys.argv[1]))"
    code += "; print(machine_limits.read_bandwidth(time.perf_counter))"
    done = subprocess.run([sys.executable, "-c", code, str(threads)], check=True, capture_output=True, cwd=HERE)
    return float(done.stdout)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
