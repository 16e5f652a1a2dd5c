"""Time from the start of `npuq generate` to its first token on the terminal, on the shipped example.

    python benchmarks/first_token.py [--repeat 7] [--json]

The example's checkpoint is converted once into a temporary directory. Then `npuq generate` runs on the artifact and on
the checkpoint, each time in a new process, until the first byte of text. In turn with these run new processes that only
import torch, or torch with transformers' automatic classes. npuq's own time is the time beyond importing torch. Prints
medians; the files are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "tiny-deepseek-v3-fp8"
PROMPT = "Call me Ishmael. Some years ago"
IMPORTS = {
    "import torch": "import torch",
    "import torch and transformers": "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=7, help="processes of each kind")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        artifact = Path(directory) / "artifact"
        npuq = [sys.executable, "-m", "npuq"]
        subprocess.run([*npuq, "convert", str(EXAMPLE), str(artifact)], check=True, capture_output=True)
        generate = ["generate", "--prompt", PROMPT, "--max-new-tokens", "8"]
        commands = {name: [sys.executable, "-c", f"{code}; print('.')"] for name, code in IMPORTS.items()}
        commands["npuq generate, artifact"] = [*npuq, *generate, str(artifact)]
        commands["npuq generate, FP8 checkpoint"] = [*npuq, *generate, str(EXAMPLE)]
        seconds = measure(commands, options.repeat)
    if options.json:
        print(json.dumps(seconds, indent=2))
        return
    torch_only = seconds["import torch"]
    print(f"{'':32} seconds  beyond torch")
    for name, value in seconds.items():
        print(f"{name:32} {value:7.3f}  {value - torch_only:12.3f}")


def measure(commands: dict[str, Sequence[str]], repeat: int) -> dict[str, float]:
    """Median seconds to each command's first byte of output, after one uncounted run of each."""
    found: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeat + 1):
        for name, command in commands.items():
            seconds = first_byte(command)
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def first_byte(command: Sequence[str]) -> float:
    """Time a process: seconds from its start to its first byte of output."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        message = process.stderr.read().decode(errors="replace")
    if process.returncode or not first.strip():
        raise SystemExit(f"{' '.join(command)}: {message.strip() or 'wrote nothing'}")
    return seconds


if __name__ == "__main__":
    main()
