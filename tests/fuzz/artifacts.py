"""Loads and runs damaged artifacts on native kernels built with AddressSanitizer and UBSan; every outcome must be
success or a one-line error.

    python tests/fuzz/artifacts.py --count 3000 [--first 0]
    python tests/fuzz/artifacts.py --first 1234 --count 1      # one of them again

A child process has the sanitizers and runs one artifact after the other. What happens to number n depends on n alone.
Exit status 1 when there is a finding: a crash, a hang, any exception that is not npuq's own, a message of several
lines, and an undamaged artifact (there are some among them) that is refused.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "native")]

SECONDS = 120  # that one artifact may take, and that Python may take to start under the sanitizers
MOST_MESSAGE = 2000


@dataclass
class Report:
    """How many artifacts ran, how many were refused, and what must not be."""

    outcomes: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)


def fuzz(bases: list[Path], folder: Path, first: int, count: int, told: Callable[[str], object] = print) -> Report:
    """Run artifacts `first` and on. `folder` is for copies; `told` hears of findings as they come."""
    report, number = Report(), first
    while number < first + count:
        number = _run_child(bases, folder, number, first + count, report, told)
    return report


def _run_child(
    bases: list[Path], folder: Path, first: int, end: int, report: Report, told: Callable[[str], object]
) -> int:
    """Let a child run them until it ends; the number to go on with."""
    from builds import sanitized_library, sanitizer_environment

    environment = {**os.environ, **sanitizer_environment(), "OMP_NUM_THREADS": "1", "PYTHONMALLOC": "malloc"}
    arguments = {"library": str(sanitized_library()), "bases": [str(base) for base in bases], "folder": str(folder)}
    command = [sys.executable, __file__, "--child", json.dumps({**arguments, "first": first, "end": end})]
    number, what = first, "start"

    def found(problem: str) -> None:
        report.findings.append(f"artifact {number} ({what}): {problem}")
        told(report.findings[-1])

    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        for line in _lines(child):
            if line is None:
                child.kill()
                found(f"no end after {SECONDS} s")
                child.wait()
                return number + 1
            event = json.loads(line)
            number = event["number"]
            if "outcome" not in event:
                what = event["mutation"]
                continue
            report.outcomes[event["outcome"]] += 1
            if event["outcome"] == "finding":
                found(event["message"])
        if child.wait() == 0:
            return end
        errors.seek(0)
        found(f"exit status {child.returncode}\n{errors.read()[-6000:]}")
        return number + 1


def _lines(child: subprocess.Popen[str]) -> Iterator[str | None]:
    """What the child prints; None when it is silent for too long."""
    lines: queue.Queue[str] = queue.Queue()

    def read(stream: IO[str]) -> None:
        for line in stream:
            lines.put(line)
        lines.put("")

    assert child.stdout is not None
    threading.Thread(target=read, args=(child.stdout,), daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=SECONDS)
        except queue.Empty:
            yield None
            return
        if not line:
            return
        yield line


# ---- in the child ----------------------------------------------------------------------------------------------------


def run_all(library: str, bases: list[str], folder: str, first: int, end: int) -> None:
    import torch
    from mutations import mutate

    import npuq.native.library

    npuq.native.library.LIBRARY = Path(library)
    assert npuq.native.library.levels(), "the library under test does not load"
    torch.set_num_threads(2)  # the pool takes as many; torch's own parts are small
    copy = Path(folder) / "damaged"
    for number in range(first, end):
        rng = random.Random(number)
        shutil.rmtree(copy, ignore_errors=True)
        base = Path(rng.choice(bases))
        shutil.copytree(base, copy)
        damage = mutate(copy, rng)
        print(json.dumps({"number": number, "mutation": f"{base.name}: {damage or 'nothing'}"}), flush=True)
        outcome = _outcome(copy, rng)
        if not damage and outcome["outcome"] == "refused":
            outcome["outcome"] = "finding"
        print(json.dumps({"number": number, **outcome}), flush=True)


def _outcome(directory: Path, rng: random.Random) -> dict[str, Any]:
    from npuq.errors import NpuqError

    try:
        _generate(directory, rng)
    except NpuqError as error:
        message = str(error)
        one_line = "\n" not in message and len(message) < MOST_MESSAGE
        return {"outcome": "refused" if one_line else "finding", "message": f"error message {message!r}"}
    except BaseException:
        return {"outcome": "finding", "message": traceback.format_exc()}
    return {"outcome": "ran", "message": ""}


def _generate(directory: Path, rng: random.Random) -> None:
    """Chunked prefill beside decoding, blocks used again, and logits of whole sequences, all in small."""
    import torch

    from npuq.formats.checkpoint import Checkpoint
    from npuq.runtime import EngineConfig, SamplingParams, load

    sizes = EngineConfig(
        kv_cache_bytes=1 << 18, block_size=16, max_num_seqs=2, max_num_batched_tokens=20, prefix_segment_tokens=32
    )
    dtype = rng.choice([torch.float32, torch.bfloat16])
    int8 = (directory / "npuq" / "kv_cache.safetensors").exists() and rng.random() < 0.5
    mapped = Checkpoint.view
    # On the heap, the sanitizer sees where a tensor ends; in a map, what is done with one is as it is for users.
    if rng.random() < 0.5:
        Checkpoint.view = Checkpoint.read  # type: ignore[method-assign]
    try:
        model = load(directory, "cpu", dtype, engine=sizes, kv_cache_dtype="int8" if int8 else "auto")
    finally:
        Checkpoint.view = mapped  # type: ignore[method-assign]
    engine = model.engine
    vocabulary = min(engine.model.config.vocab_size, 1 << 20)
    for length in (5, 30, 1):
        prompt = [rng.randrange(vocabulary) for _ in range(length)]
        engine.add(prompt, SamplingParams(max_new_tokens=4))
    while engine.scheduler.has_work:
        engine.step()
    for logits in engine.logits([[rng.randrange(vocabulary) for _ in range(length)] for length in (3, 26)]):
        assert logits.shape[1] == engine.model.config.vocab_size


# ----------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first artifact")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_all(**json.loads(options.child))
        return 0
    from fuzz_bases import make_bases

    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="npuq-fuzz-") as folder:
        bases = make_bases(Path(folder) / "bases")
        report = fuzz(bases, Path(folder), options.first, options.count, lambda text: print(text, flush=True))
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in sorted(report.outcomes.items()))
    print(
        f"{options.count} artifacts in {time.monotonic() - started:.0f} s: {outcomes}; {len(report.findings)} findings"
    )
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
