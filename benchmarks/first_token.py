"""Time from the start of `npuq generate` to its first token on the terminal, on the shipped example.

    python benchmarks/first_token.py [--repeat 7] [--json]

The example's checkpoint is converted once into a temporary directory. Then `npuq generate` runs on the artifact and on
the checkpoint, each time in a new process, until the first byte of text. In turn with these run new processes that only
import torch, or torch with transformers' automatic classes. npuq's own time is the time beyond importing torch. Prints
medians with the least and the greatest; the files are in the page cache. Processor seconds are beside them in the JSON.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from measure.machine import as_json
from measure.rounds import Figures, summary, with_spread

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
        found = summary(measure(commands, options.repeat))
    if options.json:
        print(as_json(found))
        return
    print(f"{'':32} seconds  beyond torch")
    for name in commands:
        print(f"{name:32} {with_spread(found, name, 3)}  {with_spread(found, f'{name}, beyond torch', 3)}")


def measure(commands: dict[str, Sequence[str]], rounds: int) -> list[Figures]:
    """Seconds to each command's first byte of output, in turns, after one uncounted run of each."""
    found: list[Figures] = []
    for turn in range(rounds + 1):
        figures: Figures = {}
        for name, command in commands.items():
            figures[name], figures[f"{name}, CPU"] = first_byte(command)
        for name in commands:
            figures[f"{name}, beyond torch"] = figures[name] - figures["import torch"]
        found += [figures] if turn else []
    return found


def first_byte(command: Sequence[str]) -> tuple[float, float]:
    """Time a process: seconds from its start to its first byte of output, and processor seconds until it ends."""
    started, before = time.perf_counter(), os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
        message = process.stderr.read().decode(errors="replace")
    if process.returncode or not first:  # a text may begin with a space
        raise SystemExit(f"{' '.join(command)}: {message.strip() or 'wrote nothing'}")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, used


if __name__ == "__main__":
    main()
