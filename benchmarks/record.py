"""Run the benchmarks one after the other, write one JSON, and the tables of README.md from it (`readme_tables.py`).

    bash benchmarks/all.sh                              everything: 25 minutes at most, on quiet cores
    bash benchmarks/all.sh --quick                      a smoke run of 5 minutes at most, whose figures say nothing
    bash benchmarks/all.sh --only kernels sampling      these alone
    bash benchmarks/all.sh --minutes 60                 more time, where the limit of a benchmark was too short
    bash benchmarks/all.sh --llama-cpp ENV/bin/python --llm-compressor ENV/bin/python --transformers      with the peers

The JSON has the machine (processor, level, clock, cores, memory, read bandwidth, versions, commit, date), then of each
benchmark its command, wall and processor seconds, load and read bandwidth before it, and its own `--json`. It is
written anew after each benchmark, so that an interrupted run leaves what was done. A benchmark that fails, or takes
longer than its limit, leaves its error; the others run, and the exit status is 1. The limits grow with --minutes. A
smoke run leaves README.md as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import readme_tables
from measure import machine

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"

# The minutes of a run, whole and smoke: the limits below are for these.
MINUTES = (25, 5)
# Less is not worth beginning a benchmark.
LEAST_SECONDS = 15


@dataclass(frozen=True)
class Benchmark:
    """A script with its options for a whole run and for a smoke run (none: left out), and the seconds that it may take
    in each. A run ends with what is left of its minutes: what may take long comes last."""

    whole: str
    quick: str
    seconds: int
    quick_seconds: int = 60


BENCHMARKS: dict[str, Benchmark] = {
    "convert": Benchmark(
        "convert.py --rounds 3 --profile", "convert.py --rounds 2 --experts 16 --shards 1 --directory build", 240
    ),
    "first-token": Benchmark("first_token.py --repeat 5", "first_token.py --repeat 1", 150),
    "kernels": Benchmark("kernels.py --rounds 3", "kernels.py --rounds 1 --repeat 2", 240),
    "runtime": Benchmark(
        "runtime.py --rounds 3", "runtime.py --rounds 2 --layers 3 --prompt 64 --tokens 4 --batch 4", 300
    ),
    "runtime-qwen3": Benchmark(
        "runtime.py --shape qwen3 --rounds 3",
        "runtime.py --shape qwen3 --rounds 2 --layers 2 --prompt 64 --tokens 4 --batch 0",
        300,
    ),
    "calibrate": Benchmark("calibrate.py", "calibrate.py --only expert --tokens 128", 360),
    "attention": Benchmark("attention.py --rounds 3", "attention.py --rounds 2 --keys 2048 --prompt 512", 120),
    "sampling": Benchmark("sampling.py --rounds 5", "sampling.py --rounds 2 --sequences 4", 120),
    "sparse-attention-v32": Benchmark(
        "sparse_attention.py --model v32 --repeat 6", "sparse_attention.py --model v32 --repeat 2", 120
    ),
    "sparse-attention-glm": Benchmark(
        "sparse_attention.py --model glm --repeat 6", "sparse_attention.py --model glm --repeat 2", 120
    ),
    "serve": Benchmark("serve.py --rounds 3", "serve.py --rounds 1 --tokens 8 --conversation 400", 180),
    "serve-random": Benchmark("serve.py --random --rounds 1 --prompt 100 --tokens 24", "", 240),
    "ranks": Benchmark("ranks.py --rounds 2", "ranks.py --rounds 1", 180),
    "context": Benchmark(
        "runtime.py --context 4096,8192 --layers 2 --rounds 2 --tokens 20 --seconds 280",
        "runtime.py --context 256,512 --rounds 2 --layers 3 --tokens 4",
        300,
    ),
    "context-32k": Benchmark("runtime.py --context 32768 --layers 2 --rounds 1 --tokens 20", "", 900),
}
# Scripts whose `--threads` is the number of cores that a process may use.
THREADED = ("kernels.py", "attention.py", "sampling.py", "runtime.py", "sparse_attention.py", "serve.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--minutes", type=float, help="of the whole run; default 25, of a smoke run 5")
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
    minutes = options.minutes or MINUTES[options.quick]
    end, stretch = time.monotonic() + 60 * minutes, max(1.0, minutes / MINUTES[options.quick])
    done = record["benchmarks"]
    for name in options.only:
        if arguments := command(name, options):
            print(f"{name}: python benchmarks/{shlex.join(arguments)}", file=sys.stderr)
            limit = min(stretch * seconds(name, options.quick), end - time.monotonic())
            done[name] = run(arguments, options.threads, limit)
            reads = [each["read_bytes_per_s"] for each in done.values() if "read_bytes_per_s" in each]
            if reads:
                spread = [min(reads), max(reads)]
                record["machine"] |= {"read_bytes_per_s": max(reads), "read_bytes_per_s_spread": spread}
            write(options.output, record)
    print(f"wrote {options.output}", file=sys.stderr)
    failed = [f"{name}: {found['error']}" for name, found in done.items() if "error" in found]
    if not options.quick:
        failed += readme_tables.write(record)
    for name, found in done.items():
        print(f"{name}: {'failed' if 'error' in found else 'done'}, {found['wall_s']:.0f} s", file=sys.stderr)
    if failed:
        raise SystemExit("\n".join(["failed:", *failed]))


def seconds(name: str, quick: bool) -> int:
    """The limit of a benchmark."""
    return BENCHMARKS[name].quick_seconds if quick else BENCHMARKS[name].seconds


def command(name: str, options: argparse.Namespace) -> list[str]:
    """The script and options of a benchmark; nothing if a smoke run leaves it out."""
    arguments = shlex.split(BENCHMARKS[name].quick if options.quick else BENCHMARKS[name].whole)
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


def run(arguments: Sequence[str], threads: int, limit: float) -> dict[str, Any]:
    """Run a benchmark for `limit` seconds at most: its own JSON as "result", or the end of what it said as "error"; and
    what it took."""
    found: dict[str, Any] = {"command": f"python benchmarks/{shlex.join(arguments)}", "load": os.getloadavg()[0]}
    started, before = time.perf_counter(), os.times()
    if limit < LEAST_SECONDS:
        return found | {"wall_s": 0.0, "cpu_s": 0.0, "error": "no time was left for it: give --minutes"}
    try:
        found["read_bytes_per_s"] = read_bandwidth(threads)
    except subprocess.SubprocessError as error:
        return found | {"wall_s": time.perf_counter() - started, "cpu_s": 0.0, "error": f"read bandwidth: {error}"}
    last_lines: deque[str] = deque(maxlen=5)
    with tempfile.TemporaryFile("w+") as output:
        # A session of its own, so that its servers and ranks end with it.
        script = [sys.executable, str(HERE / arguments[0]), *arguments[1:]]
        process = subprocess.Popen(
            script, stdout=output, stderr=subprocess.PIPE, text=True, cwd=HERE.parent, start_new_session=True
        )
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), _end(process)))
        timer.start()
        try:
            assert process.stderr is not None
            for line in process.stderr:
                print(line, end="", file=sys.stderr)
                last_lines.append(line)
            process.wait()
        finally:
            timer.cancel()
            _end(process)
        output.seek(0)
        answer = output.read()
    after = os.times()
    found["wall_s"] = time.perf_counter() - started
    found["cpu_s"] = after.children_user + after.children_system - before.children_user - before.children_system
    if late.is_set():
        return found | {"error": f"stopped at its limit of {limit:.0f} s; it last said: {''.join(last_lines).strip()}"}
    if process.returncode:
        return found | {"error": f"exit status {process.returncode}: {''.join(last_lines).strip()}"}
    try:
        return found | {"result": json.loads(answer)}
    except json.JSONDecodeError as error:
        return found | {"error": f"its --json is none: {error}"}


def _end(process: subprocess.Popen[str]) -> None:
    """End a benchmark with all that it started, gently first."""
    for number, patience in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 0.0)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def read_bandwidth(threads: int) -> float:
    """Bytes/s of reading memory, in a process of its own, which gives its buffer back."""
    code = "import sys, time, torch; from measure import machine_limits; torch.set_num_threads(int(sys.argv[1]))"
    code += "; print(machine_limits.read_bandwidth(time.perf_counter))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(threads)], check=True, capture_output=True, cwd=HERE, timeout=60
    )
    return float(done.stdout)


def write(path: Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)


if __name__ == "__main__":
    main()
