"""The page: one self-contained HTML file, written whole or not at all."""

from __future__ import annotations

import os
import secrets
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from .. import __version__
from ..errors import ReportError
from ..units import format_bytes
from ..verification.task_results import rows
from .style import error, number, scheme_label
from .summary import largest_errors, tiles, unreached

if TYPE_CHECKING:
    from .facts import Facts

_GENERATOR = "npuq report"
_HEAD_BYTES = 1000
# In the order of the page.
_SECTIONS = {
    "evaluation": "Evaluation",
    "layers": "Output error",
    "experts": "Experts",
    "linears": "Other linears",
    "largest": "Largest errors",
    "coverage": "Calibration",
    "smoothing": "Smoothing",
    "cache": "Int8 KV cache",
    "sizes": "Size",
    "scales": "Scales",
    "provenance": "Recipe and provenance",
}


def write_report(facts: Facts, output: str | Path) -> Path:
    """Write the page about an artifact; an earlier report of npuq's is replaced, by one rename.

    Raises ReportError when plotly is not installed, when `output` exists and is no report, and when the disk refuses;
    an earlier file remains then.
    """
    output = Path(output)
    check_output(output)
    page = render(facts)
    partial = output.with_name(f".{output.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("x", encoding="utf-8") as file:
            file.write(page)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(output)
    except OSError as error:
        raise ReportError(f"{output}: cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    return output


def check_output(output: Path) -> None:
    """Raise ReportError unless a report can be written here, replacing nothing but an older one."""
    if output.exists() and not output.is_file():
        raise ReportError(f"{output}: is a directory or a device; name a file with -o")
    if not output.parent.is_dir():
        raise ReportError(f"{output.parent}: no such directory; make it, or name another file with -o")
    try:
        with output.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ReportError(f"{output}: cannot be read: {error.strerror or error}") from error
    if f'content="{_GENERATOR}'.encode() not in head:
        raise ReportError(f"{output}: exists and is no report of npuq's; name another file with -o, or remove it")


def render(facts: Facts) -> str:
    """Render the page as text. Raises ReportError without plotly."""
    try:
        from plotly.io import to_html
        from plotly.offline import get_plotlyjs

        from .figures import figures
    except ImportError as error:
        raise ReportError(f"a report needs plotly ({error}): pip install 'npuq[report]'") from error
    drawn = {
        name: to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            div_id=f"figure-{index}",
            config={"responsive": True, "displayModeBar": False},
        )
        for index, (name, figure) in enumerate(figures(facts).items())
    }
    largest = largest_errors(facts.linears)
    shown = {"sizes", "provenance", *(name.split()[0] for name in drawn)}
    shown |= {"evaluation"} if facts.evaluations else set()
    shown |= {"coverage"} if facts.coverage is not None else set()
    shown |= {"largest"} if largest else set()
    return _template().render(
        facts=facts,
        generator=f"{_GENERATOR} {__version__}",
        contents=[(name, title) for name, title in _SECTIONS.items() if name in shown],
        shown=shown,
        figures=drawn,
        plotly=get_plotlyjs(),
        tiles=tiles(facts),
        largest=largest,
        unreached=[] if facts.coverage is None else unreached(facts.coverage),
    )


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "size": format_bytes,
        "error": error,
        "scheme": scheme_label,
        "number": number,
        "task_rows": rows,
    }
    return environment.from_string(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
