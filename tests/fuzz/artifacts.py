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
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "native")]

from children import Child, Report  # noqa: E402

SECONDS = 120  # that one artifact may take, and that Python may take to start under the sanitizers
MOST_MESSAGE = 2000


def fuzz(bases: list[Path], folder: Path, first: int, count: int, told: Callable[[str], object] = print) -> Report:
    """Run artifacts `first` and on. `folder` is for copies; `told` hears of findings as they come."""
    from builds import sanitized_library, sanitizer_environment

    child = Child(
        script=Path(__file__),
        arguments={"library": str(sanitized_library()), "bases": [str(base) for base in bases], "folder": str(folder)},
        environment={**os.environ, **sanitizer_environment(), "OMP_NUM_THREADS": "1", "PYTHONMALLOC": "malloc"},
        seconds=SECONDS,
        named="artifact {}".format,
    )
    report, number = Report(), first
    while number < first + count:
        number = child.run(number, first + count, None, report, told)
    return report


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
        print(json.dumps({"number": number, "what": f"{base.name}: {damage or 'nothing'}"}), flush=True)
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
