"""Fixtures of checkpoints with sparse attention."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from sparse_models import Sparse


@pytest.fixture
def sparse(tmp_path: Path) -> Callable[..., Sparse]:
    """`sparse(name, mtp=…, **config changes)`: a checkpoint in tmp_path / "source"."""
    from sparse_models import make_sparse

    return lambda name, **options: make_sparse(tmp_path / "source", name, **options)
