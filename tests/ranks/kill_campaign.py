"""Kill random ranks at random times, and see that all end within ten seconds, with one line.

    .venv/bin/python tests/ranks/kill_campaign.py --count 100 --seed 1

A finding is a hang, a rank that stays, no line of npuq's or several, or a traceback. It is printed with its number,
which runs it again: `--first 17 --count 1`.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3-fp8"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM)
START_SECONDS = 120.0
WITHIN_SECONDS = 10.0


@dataclass(frozen=True)
class Kill:
    """One kill. delay: seconds after the first step; of an early one, after all processes exist."""

    ranks: int
    rank: int
    number: signal.Signals
    delay: float
    early: bool

    @classmethod
    def of(cls, seed: int, case: int) -> Kill:
        choice = random.Random(f"{seed}:{case}")
        ranks = choice.choice((2, 2, 4))
        early = choice.random() < 0.3
        rank, number = choice.randrange(ranks), choice.choice(SIGNALS)
        return cls(ranks, rank, number, choice.uniform(0.0, 8.0 if early else 2.0), early)


@dataclass(frozen=True)
class End:
    """What was seen after a kill. seconds: until torchrun and all ranks were gone; None where they were not in time."""

    seconds: float | None
    stderr: str

    @property
    def lines(self) -> list[str]:
        return [line for line in self.stderr.splitlines() if "npuq: error:" in line]

    def fault(self, early: bool = False) -> str | None:
        """Name what is wrong; None for an end as it should be. early: the ranks may not have met yet."""
        if self.seconds is None:
            return "ranks are left"
        if self.seconds > WITHIN_SECONDS:
            return f"took {self.seconds:.1f} s"
        if len(self.lines) > 1 or (not self.lines and not early):
            return f"{len(self.lines)} lines"
        if f'File "{ROOT}/cli' in self.stderr:  # torchrun prints a traceback of its own
            return "a traceback"
        return None


def start(ranks: int, stderr: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `npuq` on that many ranks, in a process group of its own. By default it generates for a long time."""
    prompts = [word for number in range(64) for word in ("--prompt", f"{number} times")]
    command = arguments or (
        "generate",
        str(EXAMPLE),
        *prompts,
        "--max-new-tokens",
        "900",
        "--seed",
        "1",
        "--temperature",
        "9",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT.parent)}
    with stderr.open("wb") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "-m", "npuq", *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=environment,
            start_new_session=True,
        )


def pids_of_ranks(launcher: subprocess.Popen[bytes], ranks: int) -> list[int]:
    """Wait until all ranks run; their process ids in order."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        found: dict[int, int] = {}
        for child in _children(launcher.pid):
            try:
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for variable in variables:
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = child
        if len(found) == ranks:
            return [found[rank] for rank in range(ranks)]
        if launcher.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError("the ranks did not start")


def wait_for_steps(stderr: Path, launcher: subprocess.Popen[bytes]) -> None:
    """Wait until rank 0 has printed its note on sampling, which comes with the first step."""
    deadline = time.monotonic() + START_SECONDS
    while "sampling:" not in stderr.read_text(errors="replace"):
        if launcher.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no step was run: {stderr.read_text(errors='replace')}")
        time.sleep(0.05)


def wait_for_end(launcher: subprocess.Popen[bytes], pids: list[int], stderr: Path, within: float) -> End:
    """Wait until launcher and ranks are gone."""
    started = time.monotonic()
    while time.monotonic() - started < within:
        # A rank that has ended is a zombie until its launcher, which may be busy, asks for it.
        if not any(_runs(pid) for pid in pids):
            seconds = time.monotonic() - started
            launcher.wait(60)
            return End(seconds, stderr.read_text(errors="replace"))
        time.sleep(0.02)
    for pid in (*pids, launcher.pid):
        if _runs(pid):
            os.kill(pid, signal.SIGKILL)
    launcher.wait(60)
    return End(None, stderr.read_text(errors="replace"))


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return False
    return state not in ("Z", "X", "")


def run(kill: Kill, folder: Path) -> End:
    """Start ranks, kill one, and wait for all to end."""
    stderr = folder / "stderr"
    launcher = start(kill.ranks, stderr)
    pids = pids_of_ranks(launcher, kill.ranks)
    if not kill.early:
        wait_for_steps(stderr, launcher)
    time.sleep(kill.delay)
    os.kill(pids[kill.rank], kill.number)
    return wait_for_end(launcher, pids, stderr, 3 * WITHIN_SECONDS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found, slowest = 0, 0.0
    for case in range(given.first, given.first + given.count):
        kill = Kill.of(given.seed, case)
        with tempfile.TemporaryDirectory(prefix="npuq-kill-") as folder:
            end = run(kill, Path(folder))
        fault = end.fault(kill.early)
        slowest = max(slowest, end.seconds or 0.0)
        print(f"{case}: {kill} → {end.seconds}, {end.lines}" + (f" FAULT: {fault}" if fault else ""), flush=True)
        if fault:
            found += 1
            print(end.stderr)
    print(f"{given.count} kills, {found} faults, slowest end {slowest:.1f} s")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
