"""Quality of other tools' W4A8 beside npuq's own methods: one row a tool and model, by npuq's evaluation.

    python benchmarks/quality/quality_peers.py MODEL... --calibration TEXT --text TEXT --work DIRECTORY
        [--samples 128] [--sequence-length 256] [--context 256] [--rows npuq-minmax npuq-mse llm-compressor msmodelslim]

MODEL: unquantized bf16 checkpoints of DeepSeek's families. `make_outliers.py` makes two of the example's checkpoint: a
hard one, and with `--spread 0 --outliers 0` the plain one in bf16. Each other tool has an environment of its own in
DIRECTORY and a script in peers/. `npuq convert` converts its output, codes and scales kept, and the evaluation is the
same as npuq's, on one runtime with the NPU's numerics. Calibration samples are the same token ids for every tool.
Prints a markdown table and, on request, JSON. Artifacts that are in DIRECTORY already are reused.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from npuq.runtime.text.tokenizer import Tokenizer

PEERS = Path(__file__).resolve().parents[1] / "peers"
NPUQ = [sys.executable, "-m", "npuq"]
_STDERR = 2  # takes the output of other programs: stdout has the table alone


@dataclass(frozen=True)
class Peer:
    """Another tool: its script in peers/ and the packages of its environment, pinned where results depend on them."""

    script: str
    packages: tuple[str, ...]


TOOLS = {
    "llm-compressor": Peer("llm_compressor_gptq.py", ("torch==2.13.0", "llmcompressor==0.14.0.1")),
    "msmodelslim": Peer("msmodelslim_w4a8.py", ("torch==2.13.0", "transformers==5.17.0", "msmodelslim==26.1.0")),
}
METHODS = {"npuq-minmax": "minmax", "npuq-mse": "mse"}


@dataclass(frozen=True)
class Cost:
    """Cost of one process: wall seconds, processor seconds (steadier under other load), largest resident set."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    command: str


@dataclass(frozen=True)
class Row:
    tool: str
    model: str
    perplexity: float
    source_perplexity: float
    kl_divergence: float
    top1_agreement: float
    cost: Cost


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rows", nargs="+", choices=[*METHODS, *TOOLS], default=[*METHODS, *TOOLS])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in arguments.models:
        name = "-".join(model.resolve().parts[-2:])
        tokens = arguments.work / f"{name}-tokens.json"
        samples = calibration_samples(model, arguments.calibration, arguments.samples, arguments.sequence_length)
        tokens.write_text(json.dumps(samples))
        for tool in arguments.rows:
            artifact = arguments.work / f"{name}-{tool}"
            cost = quantize(tool, model, artifact, tokens, arguments.work)
            rows.append(judge(tool, name, artifact, model, arguments.text, arguments.context, cost))
            print(f"{tool} on {name}: {rows[-1]}", file=sys.stderr)
    print(table(rows))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")


def calibration_samples(model: Path, text: Path, samples: int, length: int) -> list[list[int]]:
    """Cut `samples` samples of `length` token ids, spread evenly over the text, each with BOS first if there is one."""
    tokenizer = Tokenizer(model)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), special=False)
    lead = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    width = length - len(lead)
    available = len(ids) // width
    if available < samples:
        raise SystemExit(f"{text}: has {available} samples of {length} tokens, fewer than --samples {samples}")
    starts = [available * index // samples * width for index in range(samples)]
    return [[*lead, *ids[start : start + width]] for start in starts]


def quantize(tool: str, model: Path, artifact: Path, tokens: Path, work: Path) -> Cost:
    """Make `artifact`, unless it exists: cost of making it."""
    record = artifact.with_suffix(".cost.json")
    if record.exists() and artifact.exists():
        return Cost(**json.loads(record.read_text()))
    if tool in METHODS:
        cost = measured([*NPUQ, "convert", str(model), str(artifact), "--method", METHODS[tool], "--workers", "1"])
    else:
        saved = artifact.with_name(f"{artifact.name}-saved")
        python = environment(work / f"env-{tool}", TOOLS[tool].packages)
        cost = measured([str(python), str(PEERS / TOOLS[tool].script), str(model), str(saved), str(tokens)])
        run([*NPUQ, "convert", str(saved), str(artifact), "--quiet"])
    record.write_text(json.dumps(asdict(cost)))
    return cost


def environment(directory: Path, packages: Sequence[str]) -> Path:
    """Python of a virtual environment with these packages, which is created if it is missing."""
    python = directory / "bin" / "python"
    ready = directory / "ready"
    if not ready.exists():
        run([sys.executable, "-m", "venv", "--clear", str(directory)])
        run([str(python), "-m", "pip", "install", "--quiet", *packages])
        ready.touch()
    return python


def judge(tool: str, name: str, artifact: Path, model: Path, text: Path, context: int, cost: Cost) -> Row:
    command = [*NPUQ, "evaluate", str(artifact), "--source", str(model), "--text", str(text), "--json", "--quiet"]
    done = subprocess.run([*command, "--context", str(context)], stdout=subprocess.PIPE, check=True)
    result = json.loads(done.stdout)
    keys = ("perplexity", "source_perplexity", "kl_divergence", "top1_agreement")
    return Row(tool, name, *(result[key] for key in keys), cost)


def measured(command: list[str]) -> Cost:
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=_STDERR)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"exit status {process.returncode}: {shlex.join(command)}")
    cpu_seconds = usage.ru_utime + usage.ru_stime
    return Cost(time.monotonic() - start, cpu_seconds, usage.ru_maxrss * 1024, shlex.join(command))


def run(command: list[str]) -> None:
    if code := subprocess.run(command, stdout=_STDERR).returncode:
        raise SystemExit(f"exit status {code}: {shlex.join(command)}")


def table(rows: Sequence[Row]) -> str:
    lines = ["| tool | model | perplexity | KL to the source | top-1 agreement | seconds | CPU s | peak memory |"]
    lines.append("|" + "---|" * 8)
    for row in rows:
        change = 100 * (row.perplexity / row.source_perplexity - 1)
        lines.append(
            f"| {row.tool} | {row.model} | {row.perplexity:.3f} ({change:+.2f} %) | {row.kl_divergence:.5f} "
            f"| {100 * row.top1_agreement:.2f} % | {row.cost.seconds:.0f} | {row.cost.cpu_seconds:.0f} "
            f"| {row.cost.peak_bytes / 1e6:.0f} MB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
