"""Push against the loopback hub, with the real client."""

from __future__ import annotations

from pathlib import Path

from loopback import LoopbackHub

import npuq
from npuq.hub.client import Backoff

REPO = "alice/tiny-w4a8"


def test_push_then_pull_gives_the_same_files(hub: LoopbackHub, artifact: Path, backoff: Backoff) -> None:
    summary = npuq.push(artifact, REPO, backoff=backoff)
    there = hub.state.files(REPO)
    for path in artifact.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert there[str(path.relative_to(artifact))] == path.read_bytes(), path
    assert "npuq/unfinished.json" not in there
    assert summary.commit == hub.state.repos[REPO].branches["main"]
    pulled = npuq.pull(REPO)
    for path in artifact.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert (pulled / path.relative_to(artifact)).read_bytes() == path.read_bytes()
