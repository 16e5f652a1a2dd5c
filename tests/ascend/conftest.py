"""Tests of the Ascend backend. `test_*.py` run anywhere; `check_*.py` run in a subprocess where torch_npu imports."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
