"""An artifact goes in, one HTML page comes out: sizes, errors, scales, calibration, provenance, for a person to read.

`facts.py` reads the numbers, `figures.py` draws them (with plotly, the extra `npuq[report]`), `page.py` fills the page.
"""

from .facts import Facts, read_facts
from .page import check_output, write_report

__all__ = ["Facts", "check_output", "read_facts", "write_report"]
