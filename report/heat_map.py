"""A heat map whose rows are layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from .style import PERCENT, laid_out

_UNKNOWN = "#e3e6ea"
_GAPS_UP_TO = 40  # cells; more have no room for lines between them


def heat_map(
    columns: Sequence[Any],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    hover: str,
) -> Any:
    """Draw `values[row][column]`, grey where None; `hover` (plotly's hovertemplate) shows `texts` as text."""
    figure = go.Figure(
        go.Heatmap(
            x=list(columns),
            y=list(rows),
            z=[list(row) for row in values],
            text=[list(row) for row in texts],
            hovertemplate=hover,
            hoverongaps=False,
            colorscale="Viridis",
            colorbar={
                "tickformat": PERCENT,
                "orientation": "h",
                "thickness": 10,
                "len": 1.0,
                "x": 0.0,
                "xanchor": "left",
                "y": 1.0,
                "yanchor": "bottom",
            },
            xgap=1 if len(columns) <= _GAPS_UP_TO else 0,
            ygap=1 if len(rows) <= _GAPS_UP_TO else 0,
        )
    )
    # Layers are names, not numbers: missing layers take no room.
    figure.update_yaxes(title="layer", type="category", range=[len(rows) - 0.5, -0.5], nticks=min(len(rows), 31))
    figure.update_xaxes(range=[-0.5, len(columns) - 0.5], showgrid=False).update_yaxes(showgrid=False)
    # Slanted names below the map need room.
    names = 7 * max(len(str(column)) for column in columns) if isinstance(columns[0], str) else 0
    height = 130 + min(names, 150) + (24 if len(rows) <= 16 else 10) * len(rows)
    return laid_out(figure, height).update_layout(plot_bgcolor=_UNKNOWN)
