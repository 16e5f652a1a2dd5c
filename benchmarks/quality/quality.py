"""Quality of each method: perplexity, KL and agreement against the float source, seconds and peak memory.

    python benchmarks/quality/quality.py SOURCE… --calibration TEXT --text TEXT [--methods …]
        [--samples N] [--json FILE]

Every row is `npuq convert --method M` in a process of its own, then `npuq evaluate` against the source; both commands
are printed. The calibration text must be another one than the evaluation's. Rows are printed as they are done.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

METHODS = (
    "minmax",
    "mse",
    "gptq",
    "smooth+mse",
    "smooth+gptq",
    "rotate+mse",
    "rotate+gptq",
    "rotate+smooth+gptq",
    "auto",
)
_CALIBRATED = ("gptq", "smooth", "auto")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also keep the rows here")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| model | method | perplexity | source | KL | agreement | seconds | peak memory |")
    print("|---|---|---:|---:|---:|---:|---:|---:|", flush=True)
    for source in arguments.sources:
        for method in arguments.methods:
            row = measure(source, method, arguments)
            rows.append(row)
            print(
                f"| {row['model']} | `{method}` | {row['perplexity']:.3f} | {row['source_perplexity']:.3f} | "
                f"{row['kl_divergence']:.6f} | {row['top1_agreement']:.2%} | {row['seconds']:.1f} | "
                f"{row['peak_rss_bytes'] / 1e6:.0f} MB |",
                flush=True,
            )
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(rows, indent=1))


def measure(source: Path, method: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run one conversion and its evaluation."""
    with tempfile.TemporaryDirectory(prefix="npuq-quality-") as folder:
        output = str(Path(folder) / "artifact")
        convert = ["convert", str(source), output, "--method", method, "--json", "--quiet"]
        if any(word in method for word in _CALIBRATED):
            convert += ["--calibration", arguments.calibration, "--samples", str(arguments.samples)]
            convert += ["--sequence-length", str(arguments.sequence_length)]
        summary = npuq(convert)
        evaluate = ["evaluate", output, "--source", str(source), "--text", arguments.text]
        result = npuq([*evaluate, "--context", str(arguments.context), "--json", "--quiet"])
    name = f"{source.resolve().parent.name}/{source.resolve().name}"
    kept = {key: summary[key] for key in ("seconds", "peak_rss_bytes")}
    return {"model": name, "method": method, "command": shlex.join(["npuq", *convert]), **kept, **result}


def npuq(arguments: list[str]) -> dict[str, Any]:
    """Run a command of npuq: the JSON document that it prints."""
    done = subprocess.run([sys.executable, "-m", "npuq", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip() or f"npuq {arguments[0]} failed")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
