"""Models to run over ranks, and where the helpers of these tests are found."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / room) for room in ("families", "convert"))]
