"""A tokenizer as Kimi and Moonlight have it."""

from __future__ import annotations

from pathlib import Path

import pytest

from .tiktoken_models import train_ranks, write_files


@pytest.fixture(scope="session")
def ranks() -> dict[bytes, int]:
    """Byte strings by rank, of a small trained vocabulary."""
    return train_ranks()


@pytest.fixture(scope="session")
def kimi_files(ranks: dict[bytes, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with Kimi's tokenizer files. Not to be changed."""
    return write_files(tmp_path_factory.mktemp("kimi"), ranks)
