"""One tiny model a family, converted once: what every family has to show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "convert")]

import tiny  # noqa: E402
from calibrated import text  # noqa: E402
from killable import Rig, tree_bytes  # noqa: E402


@pytest.fixture(scope="session", params=sorted({*tiny.FAMILIES, *tiny.PACKED}))
def family(request: pytest.FixtureRequest) -> str:
    """The name of each tiny model."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def family_pair(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """For each family a transformers model and the directory of its checkpoint."""
    directory = tmp_path_factory.mktemp(family) / "source"
    return tiny.make_source(directory, family), directory


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration text of words that every tiny tokenizer has."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text(4000, vocabulary=tiny.VOCABULARY))
    return path


@pytest.fixture(scope="session")
def rig() -> Iterator[Rig]:
    running = Rig()
    yield running
    running.close()


@pytest.fixture(scope="session")
def tree() -> Callable[[Path], dict[str, bytes]]:
    return tree_bytes
