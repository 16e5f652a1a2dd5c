"""Checkpoints and artifacts to run, and each set of operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from example_artifact import artifact, int8_artifact  # noqa: F401  (fixtures)

import npuq
import npuq.runtime
from npuq.runtime.backend import make_ops
from npuq.runtime.ops import Ops
from npuq.runtime.ops.cpu import CpuOps
from npuq.runtime.ops.reference import ReferenceOps

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("families", "convert")]

from tiny import make_checkpoint as make_tiny_checkpoint  # noqa: E402


@pytest.fixture(scope="session")
def make_checkpoint() -> Callable[..., Any]:
    """`make_checkpoint(directory, family, **config changes)`: a random checkpoint, and transformers' model of it."""
    return make_tiny_checkpoint


@pytest.fixture(scope="module")
def example(example_fp8: Path) -> npuq.runtime.LanguageModel:
    """The shipped checkpoint, loaded."""
    return npuq.runtime.load(example_fp8, "cpu")


# The last runs on native kernels where they are built.
OPERATOR_SETS: dict[str, Callable[[], Ops]] = {
    "reference": ReferenceOps,
    "torch": CpuOps,
    "cpu": lambda: make_ops("cpu"),
}


@pytest.fixture(scope="session", params=OPERATOR_SETS)
def ops(request: pytest.FixtureRequest) -> Ops:
    """Each CPU set of operators, in float32."""
    return OPERATOR_SETS[request.param]()
