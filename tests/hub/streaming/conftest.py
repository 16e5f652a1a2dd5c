"""The shipped checkpoint on the hub, and its artifact as a conversion from the disk makes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from loopback import LoopbackHub
from streaming import OPTIONS, SOURCE
from support import MANIFEST, contents, files_of

from npuq.convert import convert_checkpoint


@pytest.fixture
def source(hub: LoopbackHub, example_fp8: Path) -> str:
    """The shipped checkpoint on the hub; returns the commit."""
    card = b"---\nlicense: mit\n---\n# Source\n"
    files = files_of(example_fp8)
    return hub.state.put(SOURCE, {**files, "README.md": card}).sha


@pytest.fixture(scope="module")
def expected(example_fp8: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The artifact of a conversion from the disk."""
    path = tmp_path_factory.mktemp("expected") / "out"
    convert_checkpoint(example_fp8, path, **OPTIONS)  # type: ignore[arg-type]
    return {name: content for name, content in contents(path).items() if name != MANIFEST}
