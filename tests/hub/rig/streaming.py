"""Conversions straight from the loopback hub, through a window smaller than the checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from support import MANIFEST, contents

from npuq.formats.checkpoint import Checkpoint
from npuq.hub import open_remote
from npuq.hub.transfer.retry import Backoff

SOURCE = "alice/source"


OPTIONS = {"method": "minmax", "max_shard_size": 2_000_000}


WINDOW = 2_500_000  # an eighth of the checkpoint


@contextlib.contextmanager
def remote(output: Path, backoff: Backoff | None = None, window_bytes: int = WINDOW) -> Iterator[Checkpoint]:
    folder = output / "npuq" / "download"
    with open_remote(SOURCE, folder, window_bytes=window_bytes, backoff=backoff) as checkpoint:
        yield checkpoint


def without_manifest(output: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(output).items() if name != MANIFEST}
