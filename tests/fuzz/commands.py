"""Runs the commands of npuq on damaged checkpoints, artifacts, recipes and texts; every outcome must be success or a
one-line error.

    python tests/fuzz/commands.py --seconds 3600 [--seed 1]
    python tests/fuzz/commands.py --seed 1 --first 1234 --count 1      # one case again

A child process runs one case after the other, each command as the command line does, within limits of memory and time.
What happens in case n depends on the seed and n alone. Exit status 1 when there is a finding: a crash, a hang, an
internal error, a message of several lines or with characters that a terminal obeys.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from children import Child, Report  # noqa: E402

SECONDS = 180  # of the clock on the wall that one case may take
BUSY_SECONDS = 20  # of processor time that one command may take
MEMORY = 4 << 30  # beside what the process has when it starts
MOST_LINE = 2500

# What is damaged, and what is done with it: `{d}` is the damaged directory, `{out}` a new one, the others are whole.
CONVERT = ["convert", "{d}", "{out}", "--workers", "1"]
GENERATE = ["generate", "{d}", "--backend", "reference", "--max-new-tokens", "2", "--json", "--prompt", "ab"]
EVALUATE = ["evaluate", "{d}", "--text", "{words}/text.txt", "--context", "20", "--backend", "reference", "--quiet"]
CALIBRATE = ["--samples", "1", "--sequence-length", "8", "--method"]
ANY = [["inspect", "{d}"], ["inspect", "{d}", "--json"], ["doctor", "{d}"], [*CONVERT, "--dry-run"], CONVERT]
LOADED = [GENERATE, [*GENERATE, "--chat"], EVALUATE, [*GENERATE, "--temperature", "1", "--seed", "1"]]
VERIFY = [["verify", "{d}"], ["verify", "{d}", "--source", "{source}"], ["report", "{d}", "--json"]]
MADE = [
    *VERIFY,
    *VERIFY,
    ["verify", "{d}", "--engine", "vllm-ascend", "--tp", "2"],
    ["report", "{d}", "-o", "{out}.html"],
    [*EVALUATE, "--save"],
    [*GENERATE, "--kv-cache-dtype", "int8"],
]
CASES: dict[str, list[list[str]]] = {
    "source": [*ANY, *LOADED, [*CONVERT, *CALIBRATE, "gptq"], [*CONVERT, *CALIBRATE, "rotate+smooth+gptq"]],
    "plain": [*ANY, *LOADED, [*CONVERT, "--method", "rotate+mse"], [*EVALUATE, "--source", "{source}", "--layers"]],
    "ranks": [CONVERT, *LOADED, *LOADED, [*CONVERT, *CALIBRATE, "gptq"]],
    "fp8": [*ANY, [*CONVERT, "--method", "minmax"]],
    "v4": [*ANY, [*CONVERT, "--method", "minmax"]],
    "compressed": [*ANY, ["verify", "{d}"], GENERATE],
    "packed": [*ANY, ["verify", "{d}"]],
    "modelslim": [*ANY, *LOADED, *VERIFY],
    "artifact": [*ANY, *LOADED, *MADE, *MADE],
    "bytes": [*ANY, *LOADED, *MADE],
    "finished": [["convert", "{source}", "{d}", "--workers", "1", "--method", "rotate+smooth+gptq",
                  "--calibration", "{words}/text.jsonl", "--samples", "2", "--sequence-length", "16",
                  "--max-shard-size", "80000"]],
    "unfinished": [["convert", "{source}", "{d}", "--workers", "1", "--method", "minmax", "--max-shard-size", "80000"],
                   ["verify", "{d}"], ["inspect", "{d}"], GENERATE],
    "words": [["convert", "{source}", "{out}", "--recipe", "{d}/recipe.yaml", "--dry-run"],
              ["convert", "{source}", "{out}", *CALIBRATE, "gptq", "--calibration", "{d}/text.jsonl"],
              ["convert", "{source}", "{out}", *CALIBRATE, "smooth+mse", "--calibration", "{d}"],
              ["evaluate", "{source}", "--text", "{d}/text.txt", "--context", "20", "--backend", "reference"]],
}  # fmt: skip
COPIED = {"finished": "artifact"}
WEIGHTS = {"artifact": 6, "source": 4, "finished": 2, "unfinished": 3}


def fuzz(
    folder: Path,
    seed: int,
    first: int,
    count: int | None,
    seconds: float | None = None,
    told: Callable[[str], object] = print,
) -> Report:
    """Run cases `first` and on, until there were `count`, or for a time. `folder` holds `make_inputs`'s directories."""
    child = Child(
        script=Path(__file__),
        arguments={"folder": str(folder), "seed": seed},
        environment={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        seconds=SECONDS,
        named=lambda number: f"case {number} of seed {seed}",
    )
    report, number, end = Report(), first, None if count is None else first + count
    until = None if seconds is None else time.monotonic() + seconds
    while (end is None or number < end) and (until is None or time.monotonic() < until):
        number = child.run(number, end, until, report, told)
    return report


# ---- in the child ----------------------------------------------------------------------------------------------------


def run_all(folder: str, seed: int, first: int, end: int | None) -> None:
    """Run cases, printing an event when one begins and when a command has ended."""
    import torch

    faulthandler.enable()
    torch.set_num_threads(1)
    protocol = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints past Python is not of the protocol
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    size = int(status["VmSize"].split()[0]) * 1024 + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    number = first
    while end is None or number < end:
        for event in _case(Path(folder), random.Random(f"{seed}:{number}")):
            protocol.write(json.dumps({"number": number, **event}) + "\n")
            protocol.flush()
        number += 1


def _case(folder: Path, rng: random.Random) -> Iterator[dict[str, Any]]:
    from mutations import mutate, reseal
    from texts import damage

    kind = rng.choice([kind for kind in CASES for _ in range(WEIGHTS.get(kind, 1))])
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    directory = work / "a" / "b"
    shutil.copytree(folder / COPIED.get(kind, kind), directory)
    done = []
    if kind not in ("words", "unfinished") and rng.random() < 0.3:
        done.append(mutate(directory, rng))
    else:
        done += [damage(directory, rng) for _ in range(rng.choice([1, 1, 1, 2]))]
        if rng.random() < 0.6:
            reseal(directory)
    commands = rng.sample(CASES[kind], min(len(CASES[kind]), rng.choice([1, 2, 3])))
    yield {"what": f"{kind}: {'; '.join(done)}"}
    places = {name: str(folder / name) for name in ("source", "words")} | {"d": str(directory)}
    for number, command in enumerate(commands):
        arguments = [part.format(**places, out=work / f"out{number}") for part in command]
        yield _outcome(arguments)


def _outcome(arguments: list[str]) -> dict[str, Any]:
    started = time.process_time()
    code, out, err = _run(arguments)
    busy = time.process_time() - started
    problem = _problem(arguments, code, out, err)
    if problem is None and busy > BUSY_SECONDS:
        problem = f"{busy:.0f} s of work"
    told = " ".join(arguments)
    if problem is None:
        return {"outcome": f"{arguments[0]} {'done' if code == 0 else 'refused'}"}
    if code == 70:
        _, _, err = _run(["--traceback", *arguments])
    return {"outcome": "finding", "message": f"{problem}\n  npuq {told}\n{err[-4000:]}"}


def _run(arguments: list[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    from npuq.cli.main import main

    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    before, sys.argv, code = sys.argv, ["npuq", *arguments], 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="backslashreplace"))  # type: ignore[attr-defined]
    return code, texts[0], texts[1]


def _problem(arguments: list[str], code: int, out: str, err: str) -> str | None:
    """What is wrong with how a command ended."""
    from npuq.inputs.printable import printable

    lines = err.splitlines()
    # What the user named is wrong usage where it is no file.
    if code not in (0, 1) and not (code == 2 and "Error: Invalid value for '--text'" in err):
        return f"exit code {code}"
    if "out of memory" in err:
        return "out of memory"
    if "Traceback" in err:
        return "traceback"
    if printable(out, keep="\n") != out or printable(err, keep="\n") != err:
        return f"prints what a terminal obeys: {(out + err)[:500]!r}"
    longest = max(map(len, [*lines, *([] if "--json" in arguments else out.splitlines())]), default=0)
    if longest > MOST_LINE:
        return f"a line of {longest} characters"
    errors = [line for line in lines if line.startswith("npuq: error: ")]
    if code == 0 and errors:
        return "an error, and exit code 0"
    # verify and doctor say on stdout what is wrong.
    told = lines[-1:] == errors or (arguments[0] in ("verify", "doctor") and bool(out))
    if code == 1 and not told:
        return "exit code 1 without one last line that says why"
    return None


# ----------------------------------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="how long to run")
    parser.add_argument("--count", type=int, help="how many cases to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_all(**json.loads(options.child))
        return 0
    if options.count is None and options.seconds is None:
        parser.error("give --seconds or --count")
    from fuzz_inputs import make_inputs

    with tempfile.TemporaryDirectory(prefix="npuq-fuzz-") as folder:
        make_inputs(Path(folder))
        limits = options.first, options.count, options.seconds
        report = fuzz(Path(folder), options.seed, *limits, told=lambda text: print(text, flush=True))
    print(f"{report.cases} cases; {len(report.findings)} findings")
    for outcome, count in sorted(report.outcomes.items()):
        print(f"  {count:>6} {outcome}")
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
