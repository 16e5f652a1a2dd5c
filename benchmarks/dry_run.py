"""Time and memory of `npuq convert --dry-run` and `npuq inspect` at the shapes of released models.

    python benchmarks/dry_run.py                          every release below
    python benchmarks/dry_run.py DeepSeek-V3 Kimi-K2 --as  the recognition of an unknown model_type too

Writes checkpoints with every tensor of a release, whose data are holes: some 30 MB on the disk. Each command runs in a
process of its own; peak memory is that process's, with torch's share (some 200 MB). Other work on the machine moves the
seconds, hardly those of the processor.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests/checkpoints"))
from published import RELEASES, write_release

from npuq.dtypes import ITEM_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=f"of {', '.join(RELEASES)}")
    parser.add_argument("--as", dest="unknown", action="store_true", help="also under an unknown model_type")
    parser.add_argument("--directory", type=Path, help="where the checkpoints are written")
    options = parser.parse_args()
    print(f"{'release':17} {'tensors':>8} {'bytes':>8}  {'command':16} {'seconds':>8} {'CPU':>6} {'peak memory':>12}")
    for release in options.releases or RELEASES:
        with tempfile.TemporaryDirectory(prefix="npuq-", dir=options.directory) as folder:
            source = Path(folder) / release
            tensors = write_release(source, RELEASES[release])
            nbytes = sum(ITEM_BYTES[dtype] * prod(shape) for _, dtype, shape in tensors)
            for command, result in measured(source, options.unknown):
                print(
                    f"{release:17} {len(tensors):8} {nbytes / 1e9:5.0f} GB  {command:16} {result.seconds:8.2f} "
                    f"{result.cpu_seconds:6.2f} {result.peak_bytes / 1e6:9.0f} MB",
                    flush=True,
                )


@dataclass(frozen=True)
class Measured:
    """Wall and processor time, and peak memory of a process."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def measured(source: Path, unknown: bool) -> Iterator[tuple[str, Measured]]:
    """Run the commands on a checkpoint, and yield what each took."""
    output = source.parent / "output"
    yield "convert --dry-run", run("convert", source, output, "--dry-run", "--force")
    yield "inspect", run("inspect", source)
    if unknown:
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"model_type": "unknown"}))
        yield "unknown", run("convert", source, output, "--dry-run", fails=True)


def run(*arguments: object, fails: bool = False) -> Measured:
    """Run the command line in a process of its own."""
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "npuq", *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    if (os.waitstatus_to_exitcode(status) != 0) != fails:
        raise SystemExit(said)
    return Measured(time.monotonic() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


if __name__ == "__main__":
    main()
