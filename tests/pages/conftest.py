"""Tests of the documentation's pages: what they name is there, and what they show runs."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "cli"))  # for warm.py
sys.path.insert(0, str(Path(__file__).parents[2] / "docs/_site"))  # for messages.py
