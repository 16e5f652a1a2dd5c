"""Jobs of the pool: whole generations of a model that the ranks divide."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from npuq.inputs.launch import Launch
from npuq.runtime.ranks.group import Distributed
from npuq.runtime.ranks.world import World

from .. import guard, harness
from .chips import Chips, as_on_npus


@dataclass
class Generated:
    """What a rank saw. run: rank 0's. calls: of the emulated operators."""

    calls: dict[str, int]
    run: harness.Run | None = None


class NoLifeline:
    """The pool looks after its processes itself."""

    def fail(self, text: str, code: int) -> None: ...

    def leave(self) -> None: ...


@contextmanager
def joined() -> Iterator[World]:
    """Let `npuq.load` find the ranks of the pool."""
    lifeline: Any = NoLifeline()
    world = World(Launch.of(os.environ), Distributed(), lifeline, tells=False)
    with mock.patch.object(World, "join", lambda *_: world):
        yield world


def generate(path: Path, parallel: str, chips: Chips) -> Generated:
    """Generate from the harness's prompts in bf16, or follow."""
    with as_on_npus(chips, wide=False) as used, joined() as world:
        ops = harness.make("ascend", torch.bfloat16, soc=chips.soc, group=world.group)
        if world.leads:
            run = harness.generate(path, ops, guard.guarded, parallel=parallel)
            return Generated(dict(used.calls), run)
        model = harness.load(path, ops, parallel=parallel)
        model.follow()
        return Generated(dict(used.calls))
