"""Kill random ranks of a conversion at random moments, start it again with other numbers of ranks, and compare bytes.

    .venv/bin/python tests/convert/ranks/killing_ranks.py --kills 100 --seed 1

A finding is an artifact with other bytes than one process makes, a rank that does not end, or an error. It is printed
with the number of its case, which runs it again: `--first 17 --kills 1`. torch is imported once; ranks are forked.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from npuq.convert.conversion import AnyPart, Internals, Part, convert_checkpoint
from npuq.convert.ranks import holder
from npuq.convert.ranks.liveness import Pulse
from npuq.convert.ranks.share import Share
from npuq.convert.write.pipeline import Durability
from npuq.errors import NpuqError

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(Path(__file__).parents[1]))

from killable import tree_bytes  # noqa: E402

EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3-fp8"
OPTIONS = {"method": "minmax", "max_shard_size": 1_000_000, "workers": 1}
_LONGEST_SECONDS = 300.0
# A dead process of another machine counts as dead after this, and a busy one must not.
_PULSE = Pulse(beat=0.1, silent=3.0)


@dataclass(frozen=True)
class Round:
    """Ranks started at once, of which some are killed after so many seconds. apart: each on a machine of its own, as
    far as they can tell."""

    parts: tuple[AnyPart, ...]
    kills: Mapping[int, float]
    apart: bool

    @classmethod
    def of(cls, draw: random.Random, span: float) -> Round:
        size = draw.choice((1, 2, 2, 3, 4))
        victims = draw.sample(range(size), draw.randint(1, size))
        parts: tuple[AnyPart, ...] = tuple(Share(rank, size) for rank in range(size))
        if draw.random() < 0.1:
            parts = (Part.WHOLE,)
            victims = [0]
        kills = {rank: draw.uniform(0.0, span) for rank in victims}
        return cls(parts, kills, draw.random() < 0.1)


def fork(source: Path, output: Path, part: AnyPart, machine: str | None) -> tuple[int, int]:
    """Start a part of the conversion in a forked process; return its number and a pipe for its answer."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    answer: dict[str, object] = {}
    try:
        os.close(reader)
        if machine is not None:
            name = machine
            holder._machine = lambda host: name
        internals = Internals(Durability(0.002, 1 << 30), pulse=_PULSE)
        summary = convert_checkpoint(source, output, part=part, internals=internals, **OPTIONS)
        answer = {"status": summary.status, "resumed": summary.jobs_resumed}
    except NpuqError as error:
        answer = {"error": str(error)}
    except BaseException:
        answer = {"fault": traceback.format_exc()}
    os.write(writer, json.dumps(answer).encode()[:60_000])
    os._exit(0)


def run(source: Path, output: Path, each: Round) -> list[dict[str, object]]:
    """Run a round; return what each rank answered, nothing of killed ones. Raises TimeoutError for one that stays."""
    began = time.monotonic()
    started = [
        fork(source, output, part, f"machine {number} {began}" if each.apart else None)
        for number, part in enumerate(each.parts)
    ]
    for rank, delay in sorted(each.kills.items(), key=lambda kill: kill[1]):
        time.sleep(max(0.0, began + delay - time.monotonic()))
        os.kill(started[rank][0], signal.SIGKILL)
    left = dict(enumerate(started))
    answers: dict[int, dict[str, object]] = {}
    while left:
        for rank, (child, reader) in list(left.items()):
            if os.waitpid(child, os.WNOHANG)[0]:
                with os.fdopen(reader, "rb") as pipe:
                    answers[rank] = json.loads(pipe.read() or b"{}")
                del left[rank]
        if time.monotonic() - began > _LONGEST_SECONDS:
            for child, _ in left.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise TimeoutError(f"ranks {sorted(left)} of {each} did not end")
        time.sleep(0.005)
    return [answers[rank] for rank in sorted(answers)]


def campaign(
    source: Path, folder: Path, kills: int, seed: int, first: int = 0, say: Callable[[str], object] = print
) -> list[str]:
    """Run cases until so many ranks were killed; return the findings."""
    expected_at, began = folder / "expected", time.monotonic()
    convert_checkpoint(source, expected_at, **OPTIONS)
    span, expected = 1.5 * (time.monotonic() - began), tree_bytes(expected_at)
    findings, killed, case = [], 0, first
    while killed < kills:
        draw, output = random.Random(f"{seed}:{case}"), folder / str(case)
        fault, rounds = None, []
        try:
            for _ in range(draw.randint(1, 3)):
                rounds.append(Round.of(draw, span))
                answers = run(source, output, rounds[-1])
                killed += len(rounds[-1].kills)
                fault = fault or next((str(answer) for answer in answers if "fault" in answer), None)
                if draw.random() < 0.3:  # too early, most often
                    answers = run(source, output, Round((Part.FINISH,), {}, False))
                    if "are not finished" not in str(answers) and "status" not in answers[0]:
                        fault = fault or str(answers)
            size = draw.choice((1, 2, 3, 4))
            shares = run(source, output, Round(tuple(Share(rank, size) for rank in range(size)), {}, False))
            last = run(source, output, Round((Part.FINISH,), {}, False))
            if any(answer.get("status") not in ("share", "finished") for answer in shares) or "status" not in last[0]:
                fault = fault or f"{shares} {last}"
            if fault is None and tree_bytes(output) != expected:
                fault = "other bytes"
        except TimeoutError as error:
            fault = str(error)
        if fault is not None:
            findings.append(f"case {case} of seed {seed}: {fault}; {rounds}")
            say(findings[-1])
        shutil.rmtree(output, ignore_errors=True)
        case += 1
    say(f"{killed} ranks killed in {case - first} conversions: {len(findings)} findings")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--source", type=Path, default=EXAMPLE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="npuq-kills-") as folder:
        found = campaign(arguments.source, Path(folder), arguments.kills, arguments.seed, arguments.first)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
