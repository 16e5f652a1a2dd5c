"""Tiny models of every family, as tests of other rooms make them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / room) for room in ("families", "convert")]
