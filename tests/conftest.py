"""Paths and settings that all tests share."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("default")


@pytest.fixture(scope="session")
def example_fp8() -> Path:
    """The shipped trained checkpoint, as DeepSeek ships theirs: FP8 in 128×128 blocks."""
    return EXAMPLES / "tiny-deepseek-v3-fp8"


@pytest.fixture(scope="session")
def eval_text() -> Path:
    return EXAMPLES / "eval.txt"
