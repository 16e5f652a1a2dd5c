"""A heat map whose rows are layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from .style import PERCENT, laid_out

_GAPS_UP_TO = 40  # cells; more have no room for lines between them


def heat_map(
    columns: Sequence[Any],
    rows: Sequence[str],
    values: Sequence[Sequence[float | None]],
    texts: Sequence[Sequence[str]],
    hover: str,
) -> Any:
    """`values[row][column]`, grey where None; `texts` are what `hover` (plotly's hovertemplate) calls text."""
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
    # Layers are names, not numbers: those that are not there take no room.
    figure.update_yaxes(title="layer", type="category", autorange="reversed", nticks=min(len(rows), 31))
    figure.update_layout(plot_bgcolor="#e3e6ea")
    laid_out(figure, 130 + (24 if len(rows) <= 16 else 10) * len(rows))
    return figure.update_layout(plot_bgcolor="#e3e6ea").update_xaxes(showgrid=False).update_yaxes(showgrid=False)
