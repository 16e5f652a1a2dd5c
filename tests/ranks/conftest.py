"""Models to run over ranks, and where the helpers of these tests are found."""

from __future__ import annotations

import sys
from pathlib import Path

from example_artifact import artifact, int8_artifact  # noqa: F401  (fixtures)

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / room) for room in ("families", "convert", "runtime"))]
