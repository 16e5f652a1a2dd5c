"""Tests of the engines' own loading code. `test_*.py` run anywhere; `check_*.py` in a subprocess that has an engine."""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "ascend")]
