"""Where the helpers of these tests are found: ranks as threads, and tiny models of every family."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("ranks", "families", "convert")]
