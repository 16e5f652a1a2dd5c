"""Tests of the command line, most of them in warm processes (`warm.py`)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
