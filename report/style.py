"""The common style of page and figures: colours, margins, forms of numbers and names."""

from __future__ import annotations

import html
from typing import Any

BEFORE, AFTER = "#b8bfc9", "#2f6fb2"
COLOURS = ("#2f6fb2", "#d2691e", "#3f8f4f", "#8e5ea2", "#b03a48", "#5c6b73", "#c2a000", "#1f9aa8")
MARK = "#e0352b"
# d3-format: percent, trailing zeros trimmed.
PERCENT = ".2~%"


def laid_out(figure: Any, height: int) -> Any:
    """The figure with a height in pixels, as wide as the page, its legend above it."""
    return (
        figure.update_layout(
            template="plotly_white",
            height=height,
            margin={"l": 8, "r": 8, "t": 24, "b": 8},
            font={"family": "system-ui, sans-serif", "size": 13, "color": "#26303a"},
            legend={"orientation": "h", "yanchor": "bottom", "y": 1.0, "x": 0.0},
            hoverlabel={"align": "left"},
        )
        .update_xaxes(automargin=True)
        .update_yaxes(automargin=True)
    )


def plain(text: str) -> str:
    """Escape foreign text (a file's name) for plotly, which reads some HTML in names."""
    return html.escape(text, quote=False)


def scheme_label(scheme: str) -> str:
    """The scheme as in the documentation: W4A8, W8A8, float."""
    return "float" if scheme == "FLOAT" else "static W8A8" if scheme == "W8A8" else scheme.removesuffix("_DYNAMIC")


def error(value: float | None) -> str:
    """A relative error in percent with two significant digits at least; a dash for None."""
    if value is None:
        return "–"
    return f"{value:.2%}" if value >= 0.01 or value == 0 else f"{value:.3%}"


def number(value: int) -> str:
    """The number with separated thousands."""
    return f"{value:,}"
