"""Kill random ranks of a conversion at random moments, start it again with other numbers of ranks, and compare bytes.

    .venv/bin/python tests/convert/ranks/killing_ranks.py --kills 100 --seed 1

A finding is an artifact with other bytes than one process makes, a rank that does not end, or an error. It is printed
with the number of its case, which runs it again: `--first 17 --kills 1`. torch is imported once; ranks are forked.
With `--calibrated` they are ranks of one launch, which calibrate together over gloo.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npuq.convert import CalibrationText
from npuq.convert.conversion import AnyPart, Internals, Part, convert_checkpoint
from npuq.convert.ranks import holder
from npuq.convert.ranks.liveness import Pulse
from npuq.convert.ranks.share import Share
from npuq.convert.ranks.team import Team
from npuq.convert.write.pipeline import Durability
from npuq.errors import NpuqError
from npuq.inputs.launch import Launch
from npuq.progress import Silent
from npuq.runtime.ranks.lifeline import Loss
from npuq.runtime.ranks.world import World

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(Path(__file__).parents[1]))

from killable import tree_bytes  # noqa: E402

EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3-fp8"
OPTIONS: dict[str, Any] = {"method": "minmax", "max_shard_size": 1_000_000, "workers": 1}
CALIBRATED: dict[str, Any] = OPTIONS | {"method": "rotate+smooth+gptq", "calibration": CalibrationText(None, 4, 32)}
_LONGEST_SECONDS = 300.0
_TORCHRUN_SECONDS = 2.0
# A dead process of another machine counts as dead after this, and a busy one must not.
_PULSE = Pulse(beat=0.1, silent=3.0)


@dataclass(frozen=True)
class Launched:
    """A rank of a launch that meets at a port of this machine."""

    launch: Launch

    def team(self) -> Team:
        """Meet the others. The loss of one ends this process at once."""
        place = {"RANK": self.launch.rank, "WORLD_SIZE": self.launch.size, "MASTER_PORT": self.launch.port}
        os.environ |= {"MASTER_ADDR": self.launch.address} | {name: str(value) for name, value in place.items()}
        world = World.join(self.launch, _AtOnce())
        assert world is not None
        return Team(world, Silent())


class _AtOnce:
    def report(self, loss: Loss) -> None:
        return

    def end_after(self, loss: Loss) -> None:
        os._exit(0)


def launched(size: int) -> tuple[AnyPart | Launched, ...]:
    """The ranks of a launch; one alone is no launch."""
    if size == 1:
        return (Part.WHOLE,)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return tuple(Launched(Launch(rank, size, rank, size, "127.0.0.1", port)) for rank in range(size))


@dataclass(frozen=True)
class Round:
    """Ranks started at once, of which some are killed after so many seconds. apart: each on a machine of its own, as
    far as they can tell."""

    parts: tuple[AnyPart | Launched, ...]
    kills: Mapping[int, float]
    apart: bool

    @classmethod
    def of(cls, draw: random.Random, span: float, calibrated: bool) -> Round:
        size = draw.choice((1, 2, 2, 3, 4))
        if calibrated:
            return cls(launched(size), {draw.randrange(size): draw.uniform(0.0, span)}, False)
        victims = draw.sample(range(size), draw.randint(1, size))
        parts: tuple[AnyPart | Launched, ...] = tuple(Share(rank, size) for rank in range(size))
        if draw.random() < 0.1:
            parts = (Part.WHOLE,)
            victims = [0]
        kills = {rank: draw.uniform(0.0, span) for rank in victims}
        return cls(parts, kills, draw.random() < 0.1)


def fork(
    source: Path, output: Path, part: AnyPart | Launched, machine: str | None, options: Mapping[str, Any]
) -> tuple[int, int]:
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
        mine = part.team() if isinstance(part, Launched) else part
        summary = convert_checkpoint(source, output, part=mine, internals=internals, **options)
        answer = {"status": summary.status, "resumed": summary.jobs_resumed}
    except NpuqError as error:
        answer = {"error": str(error)}
    except BaseException:
        answer = {"fault": traceback.format_exc()}
    os.write(writer, json.dumps(answer).encode()[:60_000])
    os._exit(0)


def run(source: Path, output: Path, each: Round, options: Mapping[str, Any] = OPTIONS) -> list[dict[str, object]]:
    """Run a round; return what each rank answered, nothing of killed ones. Raises TimeoutError for one that stays."""
    began = time.monotonic()
    started = [
        fork(source, output, part, f"machine {number} {began}" if each.apart else None, options)
        for number, part in enumerate(each.parts)
    ]
    for rank, delay in sorted(each.kills.items(), key=lambda kill: kill[1]):
        time.sleep(max(0.0, began + delay - time.monotonic()))
        os.kill(started[rank][0], signal.SIGKILL)
    if any(isinstance(part, Launched) for part in each.parts):
        # torchrun ends the others, also those that wait for a rank that never came.
        time.sleep(_TORCHRUN_SECONDS if each.kills else 0)
        for child, _ in started if each.kills else ():
            os.kill(child, signal.SIGKILL)
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
    source: Path,
    folder: Path,
    kills: int,
    seed: int,
    first: int = 0,
    say: Callable[[str], object] = print,
    calibrated: bool = False,
) -> list[str]:
    """Run cases until so many ranks were killed; return the findings."""
    expected_at, began = folder / "expected", time.monotonic()
    options = CALIBRATED if calibrated else OPTIONS
    run(source, expected_at, Round((Part.WHOLE,), {}, False), options)
    span, expected = 1.5 * (time.monotonic() - began), tree_bytes(expected_at)
    findings, killed, case = [], 0, first
    while killed < kills:
        draw, output = random.Random(f"{seed}:{case}"), folder / str(case)
        fault, rounds = None, []
        try:
            for _ in range(draw.randint(1, 3)):
                rounds.append(Round.of(draw, span, calibrated))
                answers = run(source, output, rounds[-1], options)
                killed += len(rounds[-1].kills)
                fault = fault or next((str(answer) for answer in answers if "fault" in answer), None)
                if draw.random() < 0.3 and not calibrated:  # too early, most often
                    answers = run(source, output, Round((Part.FINISH,), {}, False))
                    if "are not finished" not in str(answers) and "status" not in answers[0]:
                        fault = fault or str(answers)
            size = draw.choice((1, 2, 3, 4))
            if calibrated:
                shares, last = [], run(source, output, Round(launched(size), {}, False), options)
            else:
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
        print(f"case {case}: {killed} ranks killed", file=sys.stderr, flush=True)
        case += 1
    say(f"{killed} ranks killed in {case - first} conversions: {len(findings)} findings")
    return findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--calibrated", action="store_true")
    parser.add_argument("--source", type=Path, default=EXAMPLE)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="npuq-kills-") as folder:
        found = campaign(
            arguments.source,
            Path(folder),
            arguments.kills,
            arguments.seed,
            arguments.first,
            calibrated=arguments.calibrated,
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
